"""Reconstruct: the base of stages that tune blocks by gradients to the original's outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aptq.core.parts import nearest_part
from aptq.engine.block import Block
from aptq.engine.knobs import Knob, Knobs, tunable_layers
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage
from aptq.engine.summed import summed
from aptq.engine.tune import Pace, Tuned, batches, tune
from aptq.engine.window import Target, Window, batch_of, held_out


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Stage):
    """Tune one to several neighbouring blocks at a time; methods say what is tuned and how fast.

    A part of the windows is held out: a block is never left worse on them than it came.
    """

    steps: int = 200  # AutoRound's
    batch: int = 8  # windows a step; AutoRound's
    pieces: int = 1  # parts of a batch whose gradients are added up; more of them need less memory
    blocks: int = 1  # tuned together; neighbouring windows overlap in all but one of them
    target: Target = "original"  # AutoRound's, EfficientQAT's and TesseraQ's
    # distance between outputs and targets (core/losses.py); squares are what all the papers take
    loss: Literal["mse", "relative", "cosine", "distribution", "trimmed", "channels"] = "mse"
    # positions count alike, or by the squared gradient of the model's loss behind the block
    rows: Literal["uniform", "gradient"] = "uniform"
    norms: float = 0.0  # rate of the norms' weights; 0 = they stay
    held: float = 0.08  # share of the windows held out: 8 of 96
    checks: int = 4  # times that the held-out loss is asked for

    def __post_init__(self) -> None:
        """Raise ValueError for counts that are none."""
        if min(self.batch, self.pieces, self.blocks, self.checks) < 1 or self.steps < 0:
            raise ValueError(
                "reconstruction: an option is out of range\n"
                f"steps = {self.steps} >= 0; batch = {self.batch}, pieces = {self.pieces}, "
                f"blocks = {self.blocks}, checks = {self.checks} >= 1\ncorrect it in the recipe"
            )
        if not 0 <= self.held < 1 or self.norms < 0:
            raise ValueError(
                "reconstruction: an option is out of range\n"
                f"held = {self.held} [0..1), norms = {self.norms} >= 0\ncorrect it in the recipe"
            )

    @property
    def window(self) -> tuple[int, int]:
        """(blocks together, blocks that are finished after each window)."""
        return self.blocks, 1

    @property
    def changes(self) -> bool:
        """A single layer is only rounded where no stage before did."""
        return False

    @property
    def original(self) -> bool:
        """The targets come from the uncompressed blocks."""
        return True

    @property
    def weighted(self) -> bool:
        """Positions are weighted by profiles."""
        return self.rows == "gradient"

    @property
    def targets(self) -> int:
        """What the original blocks give, for each kind of input."""
        return 2 if self.target == "both" else 1

    @property
    def tuning(self) -> float:
        """Float32 latent, gradient, two moments, the best of both ends, and the soft weight."""
        return 28.0

    def passes(self, windows: int) -> float:
        """Forward and backward (twice as much) of every step, the targets, and the checks."""
        checked = self.checks * held_out(windows, batch_of(self.batch, windows), self.held)
        return self.blocks * (3.0 * self.steps * self.batch + checked + windows)

    def batches(self, windows: int) -> tuple[int, ...]:
        """Batch sizes that blocks will be called with."""
        size = batch_of(self.batch, windows)
        return tuple({len(part) for part in torch.arange(size).chunk(self.pieces)} | {size})

    @abstractmethod
    def knob(self, layer: Layer, generator: torch.Generator) -> Knob:
        """What may change in one layer, starting from its parts if it has any."""

    def open(self, block: Block, generator: torch.Generator) -> Knobs:
        """What may change in a block."""
        found = {}
        for name, layer in tunable_layers(block).items():
            knob = summed(layer, lambda own: self.knob(own, generator))
            assert knob is not None, name
            found[name] = knob
        return Knobs(block, found, self.norms)

    @abstractmethod
    def pace(self) -> Pace:
        """Optimizer and schedule."""

    def on_layer(self, layer: Layer) -> Layer:
        """Round to nearest where no stage before did: the start of the tuning."""
        return nearest(layer)

    def on_blocks(self, blocks: Sequence[Block]) -> None:
        """Tune the blocks of one window together."""
        generator = torch.Generator().manual_seed(blocks[0].index)
        for block in blocks:
            for layer in [x for group in block.groups for x in block.open_layers(group)]:
                if layer.target.grid is not None and layer.target.grid.special:
                    nearest(layer)  # no knob opens it
        knobs = [self.open(block, generator) for block in blocks]
        tuned = self.fit(blocks, knobs, generator)
        for block, own in zip(blocks, knobs, strict=True):
            own.settle()
            block.close_stage()
        if tuned is not None:
            blocks[-1].records.append({"stage": self.name, **vars(tuned)})

    def fit(
        self, blocks: Sequence[Block], knobs: Sequence[Knobs], generator: torch.Generator
    ) -> Tuned | None:
        """Run the loop; None where nothing can be trained."""
        count = len(blocks[0].stream.hidden)
        size = batch_of(self.batch, count)
        window = Window(
            blocks,
            knobs,
            target=self.target,
            loss=self.loss,
            size=size,
            weighted=self.weighted,
        )
        inside, outside = shares(count, size, self.held)
        order = batches(len(inside), min(size, len(inside)), generator)

        def gradients(_step: int) -> Tensor:
            return window.gradients(inside[next(order)], self.pieces)

        def loss() -> float:
            return window.measure(outside)

        subject = Together(knobs)
        return tune(subject, gradients, loss, self.pace()) if subject.groups() else None


def nearest(layer: Layer) -> Layer:
    """The layer with a part: rounded to nearest where it had none."""
    if not layer.coded:
        grid = layer.target.grid
        assert grid is not None, layer.name
        layer.add(nearest_part(layer.residual(), grid))
    return layer


def shares(count: int, size: int, held: float) -> tuple[Tensor, Tensor]:
    """Numbers of the windows to train on and to hold out, LongTensors.

    The latter are spread over all, for their order may be that of a text.  Where there are too few
    windows for two batches the first are both.
    """
    everything = torch.arange(count)
    outside = torch.linspace(0, count - 1, held_out(count, size, held)).round().long()
    inside = everything[~torch.isin(everything, outside)]
    return inside, outside if len(outside) else inside[:size]


class Together:
    """The knobs of several blocks as one thing to tune."""

    def __init__(self, knobs: Sequence[Knobs]) -> None:
        self.knobs = knobs

    def groups(self) -> list[dict[str, object]]:
        """torch parameter groups."""
        return [group for knobs in self.knobs for group in knobs.groups()]

    def begin(self, turn: int, turns: int) -> None:
        """A turn begins."""
        for knobs in self.knobs:
            knobs.begin(turn, turns)

    def stepped(self) -> None:
        """A step was taken."""
        for knobs in self.knobs:
            knobs.stepped()

    def state(self) -> dict[str, Tensor]:
        """State of all knobs under the number of their block."""
        return {
            f"{number}.{name}": value
            for number, knobs in enumerate(self.knobs)
            for name, value in knobs.state_dict().items()
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take a copy of `state()` back."""
        for name, value in self.state().items():
            value.copy_(state[name])
