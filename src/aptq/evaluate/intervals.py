"""What figures of a sample are worth: bootstrap intervals of means and tests of paired items.

Windows are resampled whole, since the tokens of one window depend on each other.  Two models are
compared on the same windows or items, window by window: most of the spread is common to both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor

LEVEL = 0.95  # of every interval that the program prints
DRAWS = 4000  # bootstrap samples: quantiles at 2.5 % come out within 4 % of the interval's width


class Interval(NamedTuple):
    """A range that holds a mean in `LEVEL` of all cases."""

    low: float
    high: float


def interval(
    values: Sequence[float], *, others: int | None = None, level: float = LEVEL, seed: int = 0
) -> Interval | None:
    """Bootstrap interval of the expected mean of `values`, one of each window.

    With `others` it is the interval for the mean that so many other windows of the same kind will
    have, which spreads by their own number too: variance s^2 (1 / n + 1 / others).  The quantiles
    are widened by sqrt(n / (n - 1)) t / z, without which few windows give too narrow intervals
    (Hesterberg, arXiv:1411.5279, section 5.3).  None for fewer than two values or values that are
    not finite.
    """
    found = torch.tensor(values, dtype=torch.float64)
    count = found.numel()
    if count < 2 or not bool(found.isfinite().all()):
        return None
    generator = torch.Generator().manual_seed(seed)
    means = _resampled(found, count, generator)
    if others is not None:
        means = found.mean() + _resampled(found, others, generator) - means
    wide = math.sqrt(count / (count - 1)) * special.stdtrit(count - 1, (1 + level) / 2)
    tail = float(special.ndtr(-wide))
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def _resampled(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means [DRAWS] of `count` draws with replacement from `values` [n]."""
    rows = max(1, (1 << 22) // count)  # so that many windows take no more than 32 MiB at a time
    sizes = [min(rows, DRAWS - start) for start in range(0, DRAWS, rows)]
    parts = (torch.randint(len(values), (size, count), generator=generator) for size in sizes)
    return torch.cat([values[part].mean(1) for part in parts])


@dataclass(frozen=True)
class Paired:
    """Mean difference of two models on the same items, its standard error, and a test of zero."""

    difference: float
    stderr: float
    p: float
    test: str  # "McNemar" for right and wrong answers, else "paired t"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Compare the values of one metric item by item; the difference is ours - theirs.

    Values that are all 0 or 1 go through McNemar's exact test, which looks at the items where the
    two differ: as many may go one way as the other.  Others go through the t test of the
    differences.  Raises ValueError for values of different items or fewer than two.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(
            "the two models were not scored on the same items\n"
            f"{len(ours)} and {len(theirs)} values; two or more pairs are needed\n"
            "use the same tasks, limit and seed for both"
        )
    both = torch.tensor([list(ours), list(theirs)], dtype=torch.float64)
    apart = both[0] - both[1]
    stderr = float(apart.std() / math.sqrt(len(apart)))
    if bool(((both == 0) | (both == 1)).all()):
        wins, losses = int((apart > 0).sum()), int((apart < 0).sum())
        tail = float(special.bdtr(min(wins, losses), wins + losses, 0.5)) if wins + losses else 1.0
        return Paired(float(apart.mean()), stderr, min(1.0, 2 * tail), "McNemar")
    ratio = float(apart.mean()) / stderr if stderr else math.copysign(math.inf, apart.mean())
    p = 1.0 if not bool(apart.any()) else float(2 * special.stdtr(len(apart) - 1, -abs(ratio)))
    return Paired(float(apart.mean()), stderr, p, "paired t")
