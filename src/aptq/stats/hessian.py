"""Hessian: the weighted second moment of inputs, H = sum_t w_t x_t x_t^T / sum_t w_t, [in, in].

H measures what an error E [out, in] of the weight does to the layer's output: tr(E H E^T) is its
mean squared change per token (arXiv:2210.17323, eq. 1; the factor 2 is left out).  Not every token
matters alike: the first of a window collects the attention of all later ones, so its errors reach
every token after it, yet in a window of 2,048 it is one row of 2,048.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from aptq.core.linalg import Damping, Factor, damped_factor
from aptq.engine.stat import Seen, Stat


@dataclass(frozen=True, kw_only=True)
class Hessian(Stat):
    """Second moment of the inputs in float32, with the rows of a window weighted by position."""

    # weight of a window's first token as a share of the number of tokens in a window, at least the
    # weight 1 that every other token has; 0 = all tokens alike
    first: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    cache: dict[object, object] = field(default_factory=dict, compare=False, repr=False)

    def start(self, columns: int, device: torch.device) -> Self:
        """Zero sums: H [columns, columns] float32, total weight and dropped rows (scalars)."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        square = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        return type(self)(
            first=self.first, sums={"h": square, "weight": zero, "dropped": zero.clone()}
        )

    def update(self, seen: Seen) -> None:
        """Add rows x [rows, in]; rows that are not finite are left out and counted."""
        # one pass: a row's sum is finite unless one of its values is not
        finite = seen.x.sum(dim=1, dtype=torch.float32).isfinite()
        x, good = seen.x, int(finite.sum())
        if good < len(x):
            x = x.masked_fill(~finite[:, None], 0)
            self.sums["dropped"] += len(x) - good
        self.sums["weight"] += good
        add_gram(self.sums["h"], x)
        extra = self.first * seen.length - 1.0
        if extra > 0:
            if seen.position is None:
                raise ValueError(
                    "the first token of a window cannot be weighted here\n"
                    f"a layer of width {x.shape[1]} gets rows that are no tokens in order\n"
                    "set first = 0.0 in the recipe"
                )
            at = (seen.position == 0).nonzero().squeeze(1)
            head = x[at].float()
            self.sums["h"].addmm_(head.T, head, alpha=extra)
            self.sums["weight"] += finite[at].sum() * extra

    def merge(self, other: Self) -> None:
        """Add the sums of another worker."""
        for name, value in other.sums.items():
            self.sums[name] += value

    def tensors(self) -> dict[str, Tensor]:
        """h [in, in] float32, weight and dropped [] float64."""
        return dict(self.sums)

    def nbytes(self, columns: int) -> int:
        """The sums; a mean and a factor of the group at work come on top."""
        return 4 * columns * columns

    def forget(self) -> None:
        """Drop the mean and its factors."""
        self.cache.clear()

    @property
    def empty(self) -> bool:
        """True when no row was seen: an expert that no token was routed to."""
        return float(self.sums["weight"]) == 0.0

    def matrix(self) -> Tensor:
        """H [in, in] float32, a mean over the weighted rows."""
        if "matrix" not in self.cache:
            upper = self.sums["h"].triu() / max(float(self.sums["weight"]), 1.0)
            self.cache["matrix"] = upper + upper.triu(1).T
        held = self.cache["matrix"]
        assert isinstance(held, Tensor)
        return held

    def factor(self, damp: float, order: Tensor | None = None) -> tuple[Factor | None, Damping]:
        """Factor of the damped H in the column order `order`, made once for the group's layers.

        The order must be a function of H alone, as those of `gptq` are.
        """
        key = (damp, None if order is None else tuple(order[:8].tolist()))
        if key not in self.cache:
            self.cache[key] = damped_factor(self.matrix(), damp, order=order)
        held = self.cache[key]
        assert isinstance(held, tuple)
        return held  # type: ignore[return-value]


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x to the upper triangle (in tiles) of `total` [in, in] float32; x [rows, in].

    On a GPU 16-bit rows are multiplied in the matrix units (exact products, float32 sums).
    """
    columns = x.shape[1]
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(x.T, x, out_dtype=torch.float32)
        return
    wide = x.float()
    # a tile row needs only the tiles from the diagonal on: 7/12 of the work with six tiles
    step = max(96, -(-columns // 6))
    for a in range(0, columns, step):
        rows = wide[:, a : a + step]
        total[a : a + step, a:].addmm_(rows.T, wide[:, a:])
