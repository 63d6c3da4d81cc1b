"""Reach: the range of every input channel; and the base of stages that fold transformations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from aptq.core.transform import first_scale
from aptq.engine.block import Block
from aptq.engine.clip import Clip, Folded, Transform
from aptq.engine.fold import Kind, Pair, foldable
from aptq.engine.knobs import Knobs, part_in, tunable_layers
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Reconstruct
from aptq.engine.stat import Seen, Stat
from aptq.engine.tune import Pace


@dataclass(frozen=True, kw_only=True)
class Reach(Stat):
    """Least and largest input of every channel, float32 [in]."""

    def start(self, columns: int, device: torch.device) -> Self:
        """Nothing seen: inf and -inf."""
        low = torch.full((columns,), torch.inf, device=device)
        return replace(self, sums={"low": low, "high": -low})

    def update(self, seen: Seen) -> None:
        """Rows that go to no expert are none."""
        if len(seen.x):
            x = seen.x.float()
            self.sums["low"] = torch.minimum(self.sums["low"], x.amin(0))
            self.sums["high"] = torch.maximum(self.sums["high"], x.amax(0))

    def merge(self, other: Self) -> None:
        """The wider range."""
        self.sums["low"] = torch.minimum(self.sums["low"], other.sums["low"])
        self.sums["high"] = torch.maximum(self.sums["high"], other.sums["high"])

    def nbytes(self, columns: int) -> int:
        """Two vectors."""
        return 8 * columns

    def ends(self) -> tuple[Tensor, Tensor]:
        """(low, high); -1 and 1 for channels that were never seen or not finite."""
        low, high = self.sums["low"].clone(), self.sums["high"].clone()
        bad = ~(low.isfinite() & high.isfinite())
        return low.masked_fill(bad, -1.0), high.masked_fill(bad, 1.0)


@dataclass(frozen=True, kw_only=True)
class Folding(Reconstruct):
    """Learned ranges for all layers and learned transformations for the pairs of some kinds."""

    steps: int = 320  # 2,560 windows, as in the papers' 20 epochs of 128 (40 epochs at 2 bits)
    clips: float = 1e-2  # rate of the ranges' logits; both papers'
    scales: float = 5e-3  # rate of the transformations; both papers'
    power: float = 0.5  # of the inputs' reach in the first scales, the weights have the rest

    def __post_init__(self) -> None:
        """Raise ValueError for rates below 0 and a power outside [0, 1]."""
        super().__post_init__()
        if min(self.clips, self.scales) < 0 or not 0 <= self.power <= 1:
            raise ValueError(
                f"{self.name}: an option is out of range\nclips = {self.clips}, scales = "
                f"{self.scales} >= 0; power = {self.power} [0..1]\ncorrect it in the recipe"
            )

    @property
    def folds(self) -> bool:
        """Weights are scaled where any pair is."""
        return bool(self.kinds())

    def kinds(self) -> tuple[Kind, ...]:
        """Pairs that are transformed.

        "q-k" is never one of them: both sides are scaled by rows, and rounding to nearest commutes
        with the scale of a row.
        """
        return ("norm", "v-o", "up-down")

    def shifted(self, pairs: Sequence[Pair]) -> bool:
        """Are shifts trained?"""
        return False

    def made(self, pair: Pair, scale: Tensor, shift: Tensor | None) -> Transform:
        """What is trained of a pair, from its first scales and shifts [width]."""
        return Transform(pair, scale, shift, self.scales)

    def knob(self, layer: Layer, generator: torch.Generator) -> Clip:
        """Ranges, from those of the part that the layer has."""
        part = part_in(self.on_layer(layer))
        assert part is not None, layer.name
        return Clip(layer.weight, part, self.clips)

    def open(self, block: Block, generator: torch.Generator) -> Knobs:
        """Ranges of the layers that are not at 16 bits, and pairs that hold no other linear."""
        layers = tunable_layers(block)
        clips = {name: self.knob(layer, generator) for name, layer in layers.items()}
        skip = len(block.name) + 1
        inside = {name[skip:] for name in layers}
        found, _ = foldable(block.module, block.name, block.groups) if self.kinds() else ([], {})
        pairs = [x for x in found if x.kind in self.kinds() and inside.issuperset(x.linears)]
        shifted = self.shifted(pairs)
        transforms = [self._started(block, pair, shifted and pair.shifts) for pair in pairs]
        return Folded(block, clips, transforms, self.norms)

    def _started(self, block: Block, pair: Pair, shifted: bool) -> Transform:
        """The transformation of a pair at its start; scales of 1 where no inputs are at hand."""
        layers = [block.layers[f"{block.name}.{path}"] for path in pair.readers]
        columns = layers[0].weight.abs().amax(0).view(pair.heads, pair.times, -1).amax(1).flatten()
        if not len(block.stream.hidden):  # a later block of a window
            ones = torch.ones_like(columns)
            return self.made(pair, ones, torch.zeros_like(ones) if shifted else None)
        group = next(x for x in block.groups if layers[0].name in x.layers.values())
        block.collect((Reach(),), group)
        stat = layers[0].stats[Reach()]
        assert isinstance(stat, Reach)
        low, high = (x.view(pair.heads, pair.times, -1) for x in stat.ends())
        low, high = low.amin(1).flatten(), high.amax(1).flatten()
        shift = (low + high) / 2 if shifted else None
        reach = torch.maximum(high.abs(), low.abs()) if shift is None else (high - low) / 2
        return self.made(pair, first_scale(reach, columns, self.power), shift)

    def pace(self) -> Pace:
        """AdamW at constant rates: both papers'."""
        return Pace(self.steps, "adamw", "constant", checks=self.checks)
