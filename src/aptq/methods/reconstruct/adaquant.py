"""AdaQuant: let gradients move weights, scales and zeros of one layer at a time (arXiv:2006.10518).

Minimises tr((Q - W) H (Q - W)^T) over the continuous weights V [out, in] that Q is rounded from and
over scales and zeros [out, groups], Q = s (clamp(round(V / s) + z, 0, 2^b - 1) - z), by
straight-through gradients.  V has no box: codes may go farther than to a neighbour.  Where the
paper takes the error on tokens (eq. 1), H stands for them, so that a step costs out x in^2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aptq.core.descent import Quadratic
from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.rounding import Scales, code_offset
from aptq.core.soft import level, opened, spread, stored_scale, stored_zero
from aptq.engine.stage import methods
from aptq.stats.refine import Refine


@methods.register("adaquant")
@dataclass(frozen=True, kw_only=True)
class AdaQuant(Refine):
    """Layer-wise calibration of weights, scales and zeros by Adam; needs no tokens, only H."""

    steps: int = 200  # the authors take 1,000 of convolutions and 50 of linears
    # rate of V in standard deviations of W; 1e-2, in the authors' code, gains half of this after
    # `gptq`
    weights: float = 3e-3
    scales: float = 1e-3  # rate of the scales as a share of each; the authors' value
    # rate of the zeros, in codes: a whole zero must travel half a code to move at all, which the
    # authors' 1e-3 does in 500 steps
    zeros: float = 1e-2

    def __post_init__(self) -> None:
        """Raise ValueError for negative numbers."""
        super().__post_init__()
        if min(self.steps, self.weights, self.scales, self.zeros) < 0:
            raise ValueError(
                "adaquant: an option is negative\n"
                f"steps = {self.steps}, weights = {self.weights}, scales = {self.scales}, "
                f"zeros = {self.zeros}\ncorrect it in the recipe"
            )

    def refine(self, problem: Quadratic, part: Quantized) -> Quantized:
        """The best that was met, row by row, the start included."""
        codes, scales, least = part.unpacked(), part.scales(), None
        for found, tried, loss in self.walk(problem, part):
            if least is None:  # where the walk starts
                least = loss
            better = loss < least
            least = torch.where(better, loss, least)
            row = better[:, None]
            codes = torch.where(row, found, codes)
            zero = None
            if scales.zero is not None and tried.zero is not None:
                zero = torch.where(row, tried.zero, scales.zero)
            scales = Scales(torch.where(row, tried.scale, scales.scale), zero)
        return Quantized.make(codes, scales, part.grid)

    def walk(self, problem: Quadratic, part: Quantized) -> Iterator[tuple[Tensor, Scales, Tensor]]:
        """Codes uint8 [out, in], stored scales and loss [out] at the start and after each step."""
        soft = Soft(problem.weight, part)
        rates = {soft.V: self.weights * float(problem.weight.std()), soft.gain: self.scales}
        if soft.zero is not None:
            rates[soft.zero] = self.zeros
        groups = [{"params": [value], "lr": rate} for value, rate in rates.items()]
        optimizer = torch.optim.Adam(groups)
        norm = None
        for step in range(self.steps + 1):
            with torch.enable_grad():
                levels, scale, zero = soft()
                error = levels * spread(scale, levels.shape[1], part.grid) - problem.weight
            with torch.no_grad():
                R = error @ problem.H
                loss = (error * R).sum(1)
                yield *stored(levels, scale, zero, part.grid), loss
                if norm is None:  # rows are problems of their own: one is as steep as another
                    norm = loss.clamp(min=torch.finfo(loss.dtype).tiny)[:, None]
            if step < self.steps:
                optimizer.zero_grad()
                error.backward(2 * R / norm)
                optimizer.step()


class Soft(nn.Module):
    """A weight on a grid of which everything may move."""

    def __init__(self, weight: Tensor, part: Quantized) -> None:
        """Rounds to exactly `part`, leaning towards weight [out, in]."""
        super().__init__()
        latent, scales = opened(part, weight)
        self.grid, self.unit = part.grid, scales.scale
        self.V = nn.Parameter(latent * spread(self.unit, weight.shape[1], self.grid))
        self.gain = nn.Parameter(torch.ones_like(self.unit))  # of the scales, as a factor
        self.zero = None if scales.zero is None else nn.Parameter(scales.zero)

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels [out, in], scales and zeros [out, groups] as they are stored, in float32."""
        columns = self.V.shape[1]
        scale, zero = (
            stored_scale(self.unit * self.gain, self.grid),
            stored_zero(self.zero, self.grid),
        )
        wide = None if zero is None else spread(zero, columns, self.grid)
        return level(self.V / spread(scale, columns, self.grid), wide, self.grid), scale, zero


def stored(levels: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Scales]:
    """Codes uint8 [out, in] and scales in their stored dtypes."""
    wide = None if zero is None else spread(zero, levels.shape[1], grid)
    codes = (levels + code_offset(wide, grid)).round().to(torch.uint8)
    if zero is not None:
        zero = zero.to(torch.uint8 if grid.zero == "int" else grid.scale_dtype)
    return codes, Scales(scale.to(grid.scale_dtype), zero)
