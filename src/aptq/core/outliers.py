"""Quantiles of tensors of any size, and CBQ's detector of values that stand apart (2312.07950)."""

from __future__ import annotations

import torch
from torch import Tensor

HALVINGS = 30  # of the range: as fine as float32 near its upper end


def quantile(values: Tensor, share: float) -> Tensor:
    """The least bound (scalar, to 2^-30 of the largest value) that `share` of `values` >= 0 keep.

    Bisected: torch.quantile ends at 2^24 values, and kthvalue runs on one core of a GPU.
    """
    wanted = share * values.numel()
    high = values.amax()
    low = torch.zeros_like(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (values <= middle).sum() >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def largest_kept(values: Tensor, factor: float = 1.5, share: float = 1.0) -> float:
    """The largest magnitude that is no outlier, of values of any shape; coarse to fine.

    Coarse: candidates are magnitudes above Q3 + factor (Q3 - Q1).  Fine: of all splits of the
    sorted candidates, the largest gap^2 - share * variance of everything below it wins, if > 0.
    """
    sizes = values.detach().abs().flatten()
    first, third = quantile(sizes, 0.25), quantile(sizes, 0.75)
    high = sizes > third + factor * (third - first)
    tail = sizes[high].double().sort().values
    if len(tail) == 0:
        return float(sizes.amax())
    body = sizes[~high].double()
    count = len(body) + torch.arange(len(tail), device=tail.device)
    ends = torch.cat([body.amax()[None], tail])  # kept values may end at any but the last
    total, squares = body.sum() + tail.cumsum(0) - tail, body.square().sum() + _before(tail)
    merit = ends.diff().square() - share * (squares / count - (total / count).square())
    best = int(merit.argmax())
    return float(ends[best] if merit[best] > 0 else ends[-1])


def _before(tail: Tensor) -> Tensor:
    """Sums of the squares in front of each value."""
    return tail.square().cumsum(0) - tail.square()
