"""Learnable weight clipping: ranges of groups as shares of their extremes (arXiv:2308.13137)."""

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.rounding import Scales
from aptq.core.soft import stored_scale, stored_zero

OPEN = 4.0  # logit of a share that has not moved, sigmoid(4) = 0.982: beyond it gradients vanish


def clipped(low: Tensor, high: Tensor, lower: Tensor, upper: Tensor, grid: Grid) -> Scales:
    """Stored scales, in float32, of the ranges sigmoid(lower) low .. sigmoid(upper) high.

    All [out, groups], low <= 0 <= high, so that zeros lie inside the codes.  Differentiable but for
    the rounding of whole zeros; with logits of infinity exactly what `rounding.fit` finds.
    """
    low, high = low * lower.sigmoid(), high * upper.sigmoid()
    if grid.zero == "none":
        far = torch.where(high > -low, high, low)
        return Scales(stored_scale(-far / (grid.levels // 2), grid), None)
    scale = stored_scale((high - low) / (grid.levels - 1), grid)
    zero = -low / scale
    return Scales(scale, stored_zero(zero.detach() if grid.zero == "int" else zero, grid))


def logits(part: Quantized, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) [out, groups] float32 whose ranges are those of a part, OPEN at most."""
    found, top = part.scales(), part.grid.levels - 1
    scale = found.scale.float()
    if found.zero is None:
        reach = scale.abs() * (part.grid.levels // 2)
        share = reach / torch.maximum(high, low.abs())
        return _logit(share), _logit(share)
    zero = found.zero.float()
    below, above = zero * scale / low.abs(), (top - zero) * scale / high
    if part.grid.zero == "int":  # one share for both ends where it rounds to the same zero
        both = top * scale / (high - low)
        alike = (both * low.abs() / scale).round() == zero
        below, above = torch.where(alike, both, below), torch.where(alike, both, above)
    return _logit(below), _logit(above)


def _logit(share: Tensor) -> Tensor:
    """Logits between those of 0.02 and OPEN; an empty side of a range is open."""
    return share.nan_to_num(nan=1.0).clamp(0.02, 0.999).logit().clamp(max=OPEN)
