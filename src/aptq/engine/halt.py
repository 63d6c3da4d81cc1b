"""Halt: end a block's pass as soon as the last linear that is watched has shown its input."""

from torch import nn

from aptq.model.dry import Call


class _Enough(Exception):
    """Nobody looks at what would follow."""


class Halt:
    """Learns in the first batch how often linears show their inputs, and ends later ones there."""

    def __init__(self, *, alike: bool) -> None:
        """alike: every batch shows as often as any other; not so where experts may stay idle."""
        self.alike, self.count, self.total = alike, 0, -1

    def shown(self) -> None:
        """A linear has shown its input; to be called last."""
        self.count += 1
        if self.alike and self.count == self.total:
            raise _Enough

    def run(self, call: Call, module: nn.Module) -> None:
        """Call the block; its outputs are not for use."""
        self.count = 0
        try:
            call.run(module)
        except _Enough:
            return
        self.total = self.count
