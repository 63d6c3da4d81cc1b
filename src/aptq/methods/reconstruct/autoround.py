"""SignRound / AutoRound: tuned rounding and ranges by sign gradient descent (arXiv:2309.05516).

Minimises |B(X0) - B_q(X)|^2 over rounding offsets V [out, in] and factors a, b [out, groups] of the
two ends of every range, W_q = s (clamp(round(W / s + V) + z, 0, 2^b - 1) - z) with
s = (b hi - a lo) / (2^b - 1) and z = round(-a lo / s), straight-through.  Every step moves by the
sign of the gradient only, and the rates add up to a half: V hardly leaves the step it started in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aptq.core.grid import Grid
from aptq.core.parts import Part, Quantized
from aptq.core.rounding import Scales
from aptq.core.soft import closed, extremes, opened, rounded, spread, stored_scale, stored_zero
from aptq.engine.knobs import Knob, part_in
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Reconstruct
from aptq.engine.stage import methods
from aptq.engine.tune import Pace


@methods.register("autoround")
@dataclass(frozen=True, kw_only=True)
class AutoRound(Reconstruct):
    """Rounding offsets and range factors of a block by sign-SGD; the authors' defaults."""

    rate: float = 0.0  # of the offsets, in steps of the grid; 0 = 1 / steps, the authors'
    # rate of the range factors as a share of the offsets'; the authors' 1; 0 = ranges stay
    ranges: float = 1.0
    # largest factor of a range; 2 lets ranges grow, as the authors' extension for low bits does
    widest: float = 1.0
    double: bool = False  # twice the rate at 3 bits and below, as the authors' "best" recipe has it

    def __post_init__(self) -> None:
        """Raise ValueError for rates and factors out of range."""
        super().__post_init__()
        if min(self.rate, self.ranges) < 0 or self.widest < 1:
            raise ValueError(
                f"autoround: an option is out of range\nrate = {self.rate} >= 0, "
                f"ranges = {self.ranges} >= 0, widest = {self.widest} >= 1\n"
                "correct it in the recipe"
            )

    def knob(self, layer: Layer, generator: torch.Generator) -> Knob:
        """The layer from its part, or from its own ranges where nothing has quantized it."""
        part, grid = part_in(layer), layer.target.grid
        if part is not None:
            return Offsets(self, layer, part.grid, *implied(part, layer.weight))
        assert grid is not None, layer.name
        ends = extremes(layer.weight, grid)
        return Offsets(self, layer, grid, *ends, torch.zeros_like(layer.weight))

    def rates(self, grid: Grid) -> tuple[float, float]:
        """(of offsets, of range factors) for layers on a grid."""
        rate = self.rate or 1.0 / max(self.steps, 1)
        rate *= 2.0 if self.double and grid.bits <= 3 else 1.0
        return rate, rate * self.ranges

    def pace(self) -> Pace:
        """Sign-SGD, falling linearly to 0: the authors'."""
        return Pace(self.steps, "sign", "linear", checks=self.checks)


class Offsets(Knob):
    """A weight whose rounding and ranges may move."""

    steady = True

    def __init__(self, stage: AutoRound, layer: Layer, grid: Grid, *start: Tensor) -> None:
        """start: ends of the ranges, lowest <= 0 and highest >= 0 [out, groups]; V [out, in]."""
        super().__init__()
        self.grid, self.widest, self.rates = grid, stage.widest, stage.rates(grid)
        self.W, (self.lowest, self.highest, offsets) = layer.weight, start
        self.V = nn.Parameter(offsets)
        self.low, self.high = (nn.Parameter(torch.ones_like(end)) for end in start[:2])

    def now(self) -> tuple[Tensor, Scales]:
        """(latent [out, in], scales [out, groups] as they are stored, in float32)."""
        low, high = self.lowest * self.low, self.highest * self.high
        if self.grid.zero == "none":  # what lies farther out gets the lowest level, as in `fit`
            ends = torch.where(high > -low, -high, -low)
            scale, zero = stored_scale(ends / (self.grid.levels // 2), self.grid), None
        else:
            scale = stored_scale((high - low) / (self.grid.levels - 1), self.grid)
            zero = stored_zero(-low / scale, self.grid)
        return self.W / spread(scale, self.W.shape[1], self.grid) + self.V, Scales(scale, zero)

    def weight(self) -> Tensor:
        """W_q [out, in] float32."""
        return rounded(*self.now(), self.grid)

    @torch.no_grad()
    def part(self) -> Part:
        """Codes, scales and zeros as they are now."""
        return closed(*self.now(), self.grid)

    def groups(self) -> list[dict[str, Any]]:
        """Offsets, and range factors where they may move."""
        pairs = zip(([self.V], [self.low, self.high]), self.rates, strict=True)
        return [{"params": params, "lr": rate} for params, rate in pairs if rate > 0]

    @torch.no_grad()
    def stepped(self) -> None:
        """Ranges neither turn around nor exceed the widest."""
        for factor in (self.low, self.high):
            factor.clamp_(0, self.widest)


def implied(part: Quantized, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lowest, highest [out, groups], V [out, in]) that give exactly this part of weight [out, in].

    Without a zero only the end on the lowest level counts: the sign of a scale stays.
    """
    latent, (scale, zero) = opened(part, weight)
    if zero is None:
        far = -scale * (part.grid.levels // 2)
        ends = far.clamp(max=0), far.clamp(min=0)
    else:
        ends = -zero * scale, (part.grid.levels - 1 - zero) * scale
    return *ends, latent - weight / spread(scale, part.shape[1], part.grid)
