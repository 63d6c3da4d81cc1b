"""Origin: the uncompressed block beside the one at work, fed by the uncompressed blocks before it.

It shows what the inputs of a layer were before anything was compressed, so that a method can make
up for what the blocks before have lost.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aptq.engine.stream import Stream, free_bytes


class Origin:
    """A copy of a block that shares its weights until they are replaced, and its own stream."""

    def __init__(self, index: int, name: str, module: nn.Module, stream: Stream) -> None:
        """`stream` holds the hidden states that enter block `index` of the original model."""
        memo: dict[int, object] = {
            id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()
        }
        # the compressed weights get new storage, so that the copy costs nothing but what changes
        self.module: nn.Module = copy.deepcopy(module, memo)
        self.index, self.name, self.stream = index, name, stream
        self.output: Tensor | None = None  # what leaves the block, where memory holds it
        self.left: set[int] | None = None  # first windows of the batches that are missing there

    def inputs(self, windows: slice, paths: Sequence[str]) -> dict[str, Tensor]:
        """Inputs [rows, in] of the linears `paths` (full names) for one batch of the stream."""
        found: dict[str, Tensor] = {}
        handles = []
        for path in paths:
            linear = self.module.get_submodule(path.removeprefix(self.name + "."))

            def hook(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                found[path] = args[0].reshape(-1, args[0].shape[-1])

            handles.append(linear.register_forward_pre_hook(hook))
        try:
            with torch.inference_mode():
                x = self.stream.hidden[windows].to(self.stream.device)
                output = self.stream.calls[self.index][x.shape[0]].at(x).run(self.module)
                self._keep(windows, output)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _keep(self, windows: slice, output: Tensor) -> None:
        """Keep what will enter the next block, so that it need not be computed again."""
        hidden = self.stream.hidden
        if self.left is None:
            self.left = set(range(0, len(hidden), self.stream.batch))
            if self.stream.file is None and hidden.nbytes <= free_bytes(hidden.device) // 4:
                self.output = torch.empty_like(hidden, pin_memory=hidden.is_pinned())
        if self.output is not None:
            self.output[windows] = output.to(self.output.device)
            self.left.discard(windows.start)

    def advance(self) -> None:
        """Move the stream to the next block."""
        if self.output is None or self.left:
            self.stream.advance(self.index, self.module)
            return
        self.stream.hidden, self.stream.calls[self.index] = self.output, {}
