"""Kinds of failure that a caller may want to tell apart; each has an exit code of its own."""

import errno
from typing import Literal

# what libraries say that have no type for it: torch on a CPU, safetensors, memory maps
_MEMORY = ("out of memory", "not enough memory", "allocate memory", "bad_alloc", "failed to map")
_MEMORY += ("can't start new thread",)  # for want of a stack
_DISK = ("no space left", "quota exceeded", "file too large")


class Infeasible(ValueError):
    """No plan fits the budget (exit code 3)."""


class Shortage(ValueError):
    """Memory or disk is not enough (exit code 4)."""


class Unsound(ValueError):
    """A numerical rescue was needed and the caller had forbidden it (exit code 5)."""


class Corrupt(ValueError):
    """A checkpoint is damaged, incomplete or of a newer version (exit code 6)."""


class Stopped(Exception):
    """Somebody asked to stop; what was finished is kept (exit code 75)."""


def scarce(error: BaseException | None) -> Literal["memory", "disk"] | None:
    """What was not enough where `error` says so, whichever library raised it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "disk"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "memory"  # torch's class by name: it may not be imported yet
    if isinstance(error, RuntimeError | ImportError) or type(error).__name__ == "SafetensorError":
        text = str(error).lower()
        if any(words in text for words in _MEMORY):
            return "memory"
        return "disk" if any(words in text for words in _DISK) else None
    return None
