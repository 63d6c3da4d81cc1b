"""Gradient: second moments of a layer's output gradient g = d(nats of all tokens) / dy, g [out].

They say what an error of the output costs: by the position of its token (the profile, which
weights the rows of a Hessian) and by the output row (E[g_j^2], the Fisher weights).
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.profile import bin_of
from aptq.engine.layer import Layer
from aptq.engine.stat import GradientStat, Seen


@dataclass(frozen=True, kw_only=True)
class Gradient(GradientStat):
    """Sums over tokens for each half of the windows, position bin and output row, in float64.

    `sums` is empty until a batch was seen, for only that tells the output's width; then it holds
    square [2, bins, out], count [2, bins] and dropped [].
    """

    def start(self, columns: int, device: torch.device) -> Self:
        """No sums yet."""
        return replace(self, sums={})

    def update(self, seen: Seen) -> None:
        """Add the gradients of a batch; rows that are not finite or no tokens are dropped."""
        assert seen.grad is not None, "only the backward walk shows gradients"
        grad, bins = seen.grad.float(), bin_of(seen.length).to(seen.grad.device)
        count = int(bins[-1]) + 1
        if not self.sums:
            square = grad.new_zeros(2, count, grad.shape[1], dtype=torch.float64)
            self.sums["square"], self.sums["count"] = square, square[:, :, 0].clone()
            self.sums["dropped"] = square.new_zeros(())
        if seen.position is None or seen.half is None:
            self.sums["dropped"] += len(grad)
            return
        finite = grad.sum(dim=1).isfinite()
        self.sums["dropped"] += (~finite).sum()
        square = grad.masked_fill(~finite[:, None], 0).square()
        # a product with indicators: its sums have one order on every device
        where = F.one_hot(seen.half * count + bins[seen.position], 2 * count) * finite[:, None]
        self.sums["square"] += (where.T.float() @ square).view(2, count, -1)
        self.sums["count"] += where.sum(0).view(2, count)

    def profile(self, half: int | None = None) -> Tensor | None:
        """Mean |g|^2 of a token by position, [bins] float64; None if no row was seen.

        Of both halves of the windows, or of one.  A bin without rows takes the value of the next
        one, else of the last before it.
        """
        square, count = self._sums(half)
        if not count.sum() > 0:
            return None
        seen = count.nonzero().squeeze(1)
        means = square.sum(1)[seen] / count[seen]
        nearest = torch.searchsorted(seen, torch.arange(len(count), device=seen.device))
        return means[nearest.clamp(max=len(seen) - 1)]

    def rows(self, half: int | None = None) -> Tensor | None:
        """E[g_j^2] of a token, [out] float64; None if no row was seen."""
        square, count = self._sums(half)
        return square.sum(0) / count.sum() if count.sum() > 0 else None

    def total(self, half: int) -> Tensor:
        """Sum of g_j^2 over the tokens of a half, [out] float64; 0 if no row was seen."""
        return self._sums(half)[0].sum(0)

    def _sums(self, half: int | None) -> tuple[Tensor, Tensor]:
        """Squares [bins, out] and counts [bins] of a half or of both."""
        if not self.sums:
            return torch.zeros(0, 0), torch.zeros(0)
        square, count = self.sums["square"], self.sums["count"]
        return (square.sum(0), count.sum(0)) if half is None else (square[half], count[half])

    def nbytes(self, columns: int) -> int:
        """The sums of a square layer with the bins of 2,048 tokens; others are of this order."""
        return 2 * 12 * 8 * columns


def gradient(layer: Layer) -> Gradient:
    """What a layer has of it."""
    held = layer.stats[Gradient()]
    assert isinstance(held, Gradient), type(held)
    return held
