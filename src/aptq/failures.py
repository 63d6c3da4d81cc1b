"""Kinds of failure that a caller may want to tell apart; each has an exit code of its own."""


class Infeasible(ValueError):
    """No plan fits the budget (exit code 3)."""


class Shortage(ValueError):
    """Memory or disk is not enough (exit code 4)."""


class Unsound(ValueError):
    """A numerical rescue was needed and the caller had forbidden it (exit code 5)."""


class Corrupt(ValueError):
    """A checkpoint is damaged, incomplete or of a newer version (exit code 6)."""
