"""Window: neighbouring blocks that are tuned together, their inputs and what they should give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from aptq.core.losses import LOSSES
from aptq.engine.block import Block
from aptq.engine.capture import Captured, steady
from aptq.engine.knobs import Knobs
from aptq.engine.stream import Stream, storage

# What the last block should give: the original's output on the original's inputs (error of the
# blocks before is made up for), on the inputs at hand, or both with equal weight
Target = Literal["original", "same", "both"]


def batch_of(size: int, windows: int) -> int:
    """Windows in a batch: `size`, or less where held-out and trained ones would not fill it."""
    return max(1, min(size, windows // 2))


def held_out(windows: int, size: int, share: float) -> int:
    """Windows that are not trained on, in whole batches: at least one where there are two."""
    if windows < 2 * size:
        return 0
    return min(max(1, math.ceil(share * windows / size)), windows // size - 1) * size


class Window:
    """Blocks with knobs; losses of batches of the calibration windows, a mean over tokens."""

    def __init__(
        self,
        blocks: Sequence[Block],
        knobs: Sequence[Knobs],
        *,
        target: Target,
        loss: str,
        size: int,
        weighted: bool,
    ) -> None:
        """size: windows in a batch; weighted: positions count as the model's gradients say."""
        self.blocks, self.knobs, self.size = blocks, knobs, size
        self.stream = blocks[0].stream
        self.loss = LOSSES[loss]
        self.weight = _weights(blocks[-1]) if weighted else None
        self.captured: Captured | None = None
        inputs = enumerate(_inputs(blocks[0], target))
        self.wanted = [self._targets(own, f"target-{number}") for number, own in inputs]

    def _targets(self, stream: Stream, name: str) -> Tensor:
        """The original blocks' output on the hidden states of `stream`, for all windows.

        On a disk they take the place of those of the window before, which nobody needs any more.
        """
        folder = None if stream.file is None else stream.file.parent
        hidden = stream.hidden
        made = torch.empty_like(hidden)
        if folder is not None:
            made, _ = storage(tuple(hidden.shape), hidden, folder, "disk", name)
        with torch.inference_mode():
            for start in range(0, len(hidden), stream.batch):
                windows = slice(start, start + stream.batch)
                x = hidden[windows].to(stream.device)
                for block in self.blocks:
                    assert block.origin is not None, "walk keeps the original where a stage asks"
                    x = stream.calls[block.index][len(x)].at(x).run(block.origin.module)
                made[windows] = x.to(made.device)
        return made

    def output(self, windows: Tensor, values: Sequence[dict[str, Tensor]]) -> Tensor:
        """Hidden states [batch, length, width] behind the last block; values: of its parameters."""
        x = self.stream.hidden[windows.to(self.stream.hidden.device)].to(self.stream.device)
        for block, own in zip(self.blocks, values, strict=True):
            call, module = self.stream.calls[block.index][len(x)].at(x), block.module
            x = call.run(lambda *a, m=module, v=own, **k: functional_call(m, v, a, k))
        return x

    def distance(self, got: Tensor, windows: Tensor) -> Tensor:
        """Loss of an output of these windows, scalar float32."""
        total = got.new_zeros((), dtype=torch.float32)
        for wanted in self.wanted:
            aim = wanted[windows.to(wanted.device)].to(got.device)
            total = total + self.loss(got, aim, self.weight)
        return total / len(self.wanted)

    def gradients(self, windows: Tensor, pieces: int) -> Tensor:
        """The loss of a batch, with its gradients in the knobs' parameters, that had none.

        `pieces` parts of it in turn.  On a GPU where all steps are alike they are recorded.
        """
        if not steady(self.knobs, [self.stream.hidden, *self.wanted]):
            return self._gradients(windows, pieces)
        if self.captured is None:
            found = [p for knobs in self.knobs for p in knobs.parameters()]
            step = partial(self._gradients, pieces=pieces)
            self.captured = Captured(step, found, windows, self.stream.device)
        return self.captured(windows)

    def _gradients(self, windows: Tensor, pieces: int) -> Tensor:
        total = torch.zeros((), device=self.stream.device)
        for part in windows.chunk(pieces):
            got = self.output(part, [knobs.tensors() for knobs in self.knobs])
            loss = self.distance(got, part) * (len(part) / len(windows))
            share = loss.detach()
            total += share
            penalties = [value for x in self.knobs if (value := x.penalty()) is not None]
            for value in penalties:
                loss = loss + value * share
            loss.backward()  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def measure(self, windows: Tensor) -> float:
        """Mean loss of windows with what would be stored."""
        for knobs in self.knobs:
            knobs.eval()
        total = 0.0
        fixed = [knobs.tensors() for knobs in self.knobs]
        for part in torch.split(windows, self.size):
            total += float(self.distance(self.output(part, fixed), part)) * len(part)
        for knobs in self.knobs:
            knobs.train()
        return total / len(windows)


def _inputs(first: Block, target: Target) -> list[Stream]:
    """Streams whose hidden states enter the original blocks that make the targets."""
    assert first.origin is not None, "walk keeps the original where a stage asks"
    return {
        "original": [first.origin.stream],
        "same": [first.stream],
        "both": [first.origin.stream, first.stream],
    }[target]


def _weights(block: Block) -> Tensor | None:
    """Weights [length] of the block's output by position, from the profile of what writes it.

    The gradient of the last linear's output is that of the residual stream behind the block.
    """
    for name in reversed([x for group in block.groups for x in group.layers.values()]):
        found = block.weighting.of(name)
        if found is not None:
            return found
    return None
