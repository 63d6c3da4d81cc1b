"""HQQ: fit real-valued zero points by half-quadratic splitting; no data (Badri and Shaji, 2023).

Minimises |W - (Q - z) s|_p^p, p < 1, over codes Q and zeros z [out, groups] at min-max scales s:
the small p forgives outliers.  An error E, penalised by beta/2 |W - (Q - z) s - E|^2, splits it
into a shrinkage step for E and a mean for z.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import part_of
from aptq.core.rounding import Scales, decode, encode, fit, snap
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods


@methods.register("hqq")
@dataclass(frozen=True, kw_only=True)
class HQQ(Stage):
    """Half-quadratic quantization; needs a grid with a zero, best with a float one (-fz)."""

    p: float = 0.7  # exponent of the error; the authors' value
    beta: float = 10.0  # first penalty, in units of 1 / scale^2; the authors' value
    growth: float = 1.01  # of the penalty, an iteration; the authors' value
    iterations: int = 20  # the authors' value

    def objective(self, layer: Layer) -> float:
        """Sum of |W - Q|^p."""
        return float(layer.residual().abs().pow(self.p).sum())

    def on_layer(self, layer: Layer) -> Layer:
        """Add the rounded residual."""
        grid = layer.target.grid
        assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
        if grid.zero == "none":
            raise ValueError(
                f"hqq fits zero points and the grid {grid} has none\nfirst layer: {layer.name}\n"
                f"use {grid}-fz, or another method"
            )
        W = layer.residual()
        scales = self.solve(W, grid)
        layer.add(part_of(snap(W, scales, grid), scales, grid))
        return layer

    def solve(self, W: Tensor, grid: Grid) -> Scales:
        """Scales with fitted zeros for W [out, in] float32; never worse than where it starts."""
        scales = fit(W, grid)
        best, least = scales, self._loss(W, scales, grid)
        owner = grid.group_of(W.shape[1]).to(W.device)
        step = scales.scale.float()[:, owner]
        beta = self.beta
        for _ in range(self.iterations):
            codes = encode(W, scales, grid)
            error = shrink(W - decode(codes, scales, grid), beta, self.p)
            zero = group_mean(codes.float() - (W - error) / step, owner, grid)
            scales = Scales(scales.scale, _stored(zero, grid))
            loss = self._loss(W, scales, grid)
            # rows on their own: one that has stopped improving keeps its best zeros
            better = loss < least
            least = torch.where(better, loss, least)
            assert best.zero is not None
            assert scales.zero is not None
            best = Scales(best.scale, torch.where(better[:, None], scales.zero, best.zero))
            beta *= self.growth
        return best

    def _loss(self, W: Tensor, scales: Scales, grid: Grid) -> Tensor:
        """Sum of |error|^p of each row, [out]."""
        return (W - snap(W, scales, grid)).abs().pow(self.p).sum(1)


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """The generalised soft threshold: what of each error is taken for an outlier."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(p - 1) / beta).clamp(min=0)


def group_mean(values: Tensor, owner: Tensor, grid: Grid) -> Tensor:
    """Mean over the columns of each group: values [out, in], owner [in] -> [out, groups]."""
    groups = grid.groups(values.shape[1])
    total = values.new_zeros(values.shape[0], groups).index_add_(1, owner, values)
    return total / torch.bincount(owner, minlength=groups)


def _stored(zero: Tensor, grid: Grid) -> Tensor:
    """Zeros as they are stored: codes, or floats within the range of codes."""
    zero = zero.clamp(0, grid.levels - 1)
    return zero.round().to(torch.uint8) if grid.zero == "int" else zero.to(grid.scale_dtype)
