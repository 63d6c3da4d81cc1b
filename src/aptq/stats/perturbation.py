"""Perturbation: what given changes dW of a layer's weight would do, by the output gradients.

g_t = d(nats of all tokens)/dy_t [out], x_t [in]; sums over tokens or windows of, for each dW,
"token": (g_t . dW x_t)^2;  "sequence": <G, dW>^2;  "absolute": sum |G * dW|, G = sum_t g_t x_t^T
of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from aptq.engine.stat import GradientStat, Seen


@dataclass(frozen=True, kw_only=True)
class Perturbation(GradientStat):
    """Sums `damage` [2 halves, changes] float64 of float32 products, without rows not finite."""

    form: Literal["token", "sequence", "absolute"]
    changes: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)  # dW [out, in]

    def start(self, columns: int, device: torch.device) -> Self:
        """Zero sums for the same changes."""
        zero = torch.zeros(2, len(self.changes), dtype=torch.float64, device=device)
        sums = {"damage": zero, "dropped": torch.zeros((), dtype=torch.float64, device=device)}
        return type(self)(form=self.form, changes=self.changes, sums=sums)

    def update(self, seen: Seen) -> None:
        """Add one batch."""
        assert seen.grad is not None
        x, g = seen.x.float(), seen.grad.float()
        good = x.sum(dim=1).isfinite() & g.sum(dim=1).isfinite()
        self.sums["dropped"] += len(x) - good.sum()
        x, g = x.masked_fill(~good[:, None], 0), g.masked_fill(~good[:, None], 0)
        half = torch.arange(len(x), device=x.device) % 2 if seen.half is None else seen.half
        if self.form == "token":
            for number, change in enumerate(self.changes):
                damage = ((x @ change.T) * g).sum(dim=1).double().square()
                for parity in (0, 1):
                    self.sums["damage"][parity, number] += damage[half == parity].sum()
            return
        for rows in windows_of(seen):
            gradient = g[rows].T @ x[rows]
            parity = int(half[rows.start])
            for number, change in enumerate(self.changes):
                self.sums["damage"][parity, number] += self._of(gradient * change)

    def _of(self, product: Tensor) -> Tensor:
        if self.form == "absolute":
            return product.abs().sum(dtype=torch.float64)
        return product.sum(dtype=torch.float64).square()

    def nbytes(self, columns: int) -> int:
        """The sums; the changes are the caller's."""
        return 16 * len(self.changes)


def windows_of(seen: Seen) -> Iterator[slice]:
    """Rows of one window after the other.

    Rows of a routed expert name no window: a new one begins where the position does not grow or
    the parity changes.  All rows are one window where they are no tokens in order.
    """
    rows, starts = len(seen.x), [0]
    if seen.position is not None and seen.half is not None and rows:
        new = seen.position[1:] <= seen.position[:-1]
        new |= seen.half[1:] != seen.half[:-1]
        starts += (new.nonzero().flatten() + 1).tolist()
    for start, stop in zip(starts, [*starts[1:], rows], strict=True):
        if stop > start:
            yield slice(start, stop)
