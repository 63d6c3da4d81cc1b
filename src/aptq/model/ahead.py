"""Ahead: the stored tensors of the block that comes next, read while a GPU is at work."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class Ahead:
    """Reads into pinned memory, from which a copy to the GPU takes milliseconds.

    Blocks are visited in order, forwards or backwards: the next one is as far from the last one as
    that was from the one before.  A wrong guess costs a reading in vain.
    """

    def __init__(
        self, names: Callable[[int], Sequence[str]], read: Callable[[str], Tensor]
    ) -> None:
        """names: of a block's stored tensors, none for a block that there is not."""
        self.names, self.read = names, read
        self.last = -1
        self.index = -1  # of the block that `found` will hold
        self.found: Future[dict[str, Tensor]] | None = None
        self.reader = ThreadPoolExecutor(1, "read-ahead")

    def take(self, index: int) -> dict[str, Tensor]:
        """What has been read of block `index`; empty where another was guessed."""
        found, self.found = self.found, None
        held = {} if found is None else found.result()
        return held if index == self.index else {}

    def start(self, index: int) -> None:
        """Block `index` is loaded: begin to read the next one."""
        step = -1 if self.last == index + 1 else 1
        self.last, self.index = index, index + step
        names = self.names(self.index)
        if names:
            self.found = self.reader.submit(self._all, names)

    def _all(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.read(name).pin_memory() for name in names}
