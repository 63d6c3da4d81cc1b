"""Importance: how much the loss hangs on single weights, sum_n |dL_n / dW| of windows n, [out, in].

Signed gradients of a trained model cancel over many windows; sizes do not (arXiv:2504.07389).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from aptq.core.bits import pack, unpack
from aptq.core.rounding import fit, snap
from aptq.engine.layer import Layer
from aptq.engine.stat import GradientStat, Seen
from aptq.stats.marked import Marked, largest
from aptq.stats.perturbation import windows_of

Weighting = Literal["gradient", "taylor", "tacq"]


@dataclass(frozen=True, kw_only=True)
class Importance(GradientStat):
    """Sums `size` float32 [out, in]; empty until a batch was seen, which tells the width."""

    def start(self, columns: int, device: torch.device) -> Self:
        """No sums yet."""
        return replace(self, sums={})

    def update(self, seen: Seen) -> None:
        """Add one batch, window by window; rows that are not finite are left out."""
        assert seen.grad is not None, "only the backward walk shows gradients"
        x, g = seen.x.float(), seen.grad.float()
        good = (x.sum(dim=1).isfinite() & g.sum(dim=1).isfinite())[:, None]
        x, g = x.masked_fill(~good, 0), g.masked_fill(~good, 0)
        if not self.sums:
            self.sums["size"] = x.new_zeros(g.shape[1], x.shape[1])
        for rows in windows_of(seen):
            self.sums["size"] += (g[rows].T @ x[rows]).abs()

    def nbytes(self, columns: int) -> int:
        """Of a square layer; others are of this order."""
        return 4 * columns * columns


@dataclass(frozen=True, kw_only=True)
class GradientMarked(Marked):
    """Outliers by the gradient of the loss, which one backward walk has found before.

    Their places come with the layer; in a measuring walk the gradients themselves are there.
    """

    @property
    def weighting(self) -> Weighting:
        """What the gradient's size is multiplied by; see `weighed`."""
        return "gradient"

    @property
    def reads(self) -> bool:
        """That walk looks at the calibration data."""
        return True

    @property
    def traced(self) -> bool:
        """It needs that walk."""
        return True

    def score(self, layer: Layer) -> Tensor | None:
        """The weighed gradients, or 1 at the places that they led to."""
        stat = layer.stats.get(Importance())
        if isinstance(stat, Importance) and stat.sums:
            return weighed(layer, stat.sums["size"], self.weighting)
        if layer.marked is None:
            return None
        return unpack(layer.marked.to(layer.weight.device), 1, layer.weight.shape[1]).float()

    def places(self, layer: Layer, count: int) -> Tensor | None:
        """The places, one bit each, uint8 [out, ceil(in / 8)]; None where no token came by."""
        score = self.score(layer)
        return None if score is None else pack(largest(score, count).to(torch.uint8), 1)


def weighed(layer: Layer, size: Tensor, weighting: Weighting) -> Tensor:
    """ "gradient": |g| (GWQ, arXiv:2411.00850); "taylor": |g (w - q)|; "tacq": |g (w - q) w|.

    q is the nearest value on the layer's grid; the paper takes what GPTQ makes.
    """
    if weighting == "gradient":
        return size
    grid, W = layer.target.grid, layer.weight
    assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
    change = (W - snap(W, fit(W, grid), grid)).abs()
    return size * change * (W.abs() if weighting == "tacq" else 1.0)
