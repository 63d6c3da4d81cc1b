"""Hessian: the weighted second moment of inputs, H = sum_t w_t x_t x_t^T / sum_t w_t, [in, in].

H measures what an error E [out, in] of the weight does to the layer's output: tr(E H E^T) is its
mean squared change per token (arXiv:2210.17323, eq. 1; the factor 2 is left out).  Not every token
matters alike: the first of a window collects the attention of all later ones, so its errors reach
every token after it, yet in a window of 2,048 it is one row of 2,048.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from aptq.core.gram import Stretches, add_gram, add_weighted, each_stretch, exact_products
from aptq.core.linalg import Damping, Factor, damped_factor, damped_factors, dead_columns
from aptq.engine.stat import MOST_DROPPED, Seen, Stat
from aptq.failures import Unsound

# share of mean(diag H) added before the drift is solved for: more than before a sweep, for it would
# fit the noise of small directions
DRIFT_DAMP = 0.03


@dataclass(frozen=True, kw_only=True)
class Hessian(Stat):
    """Second moment of the inputs in float32, with the rows of a window weighted by position."""

    # weight of a window's first token as a share of the number of tokens in a window, at least the
    # weight 1 that every other token has; 0 = all tokens alike
    first: float = 0.0
    # weights of the rows: all alike, or by the squared output gradient at their position (the
    # layer's profile), which also weights rows of experts
    rows: Literal["uniform", "gradient"] = "uniform"
    power: float = 1.0  # of the gradient weights; smaller values shrink them towards uniform
    # one H for all layers of a group, weighted by the mean of their profiles, or one for each; at
    # equal quality (docs/log.md) the first needs half of the products and factors
    share: bool = True
    # also R = sum_t w_t (x0_t - x_t) x_t^T / sum_t w_t, x0 the input in the uncompressed model
    drift: bool = False
    cache: dict[object, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def own(self) -> bool:
        """Layers have different profiles; unless they share their mean, each needs its own H."""
        return self.rows == "gradient" and not self.share

    @property
    def compares(self) -> bool:
        """Drift is a difference from the uncompressed model."""
        return self.drift

    @property
    def weighted(self) -> bool:
        """Gradient weights are known beforehand."""
        return self.rows == "gradient"

    def __post_init__(self) -> None:
        """Raise ValueError for two weightings at once and for a negative power."""
        if self.power < 0 or (self.first and self.rows == "gradient"):
            raise ValueError(
                "a Hessian's rows cannot be weighted like this\n"
                f"rows = {self.rows!r}, power = {self.power}, first = {self.first}\n"
                "set first = 0.0 with gradient weights, which know the first token; power >= 0"
            )

    def start(self, columns: int, device: torch.device) -> Self:
        """Zero sums: H [columns, columns] float32, total weight and dropped rows (scalars)."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        square = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        sums = {"h": square, "weight": zero, "dropped": zero.clone(), "rows": zero.clone()}
        if self.drift:
            sums["cross"] = torch.zeros_like(square)
        return replace(self, sums=sums, cache={})

    def update(self, seen: Seen) -> None:
        """Add rows x [rows, in]; rows that are not finite are left out and counted."""
        # one pass: a row's sum is finite unless one of its values is not
        narrow = seen.x.dtype == torch.float16  # its sums leave its range
        finite = seen.x.sum(dim=1, dtype=torch.float32 if narrow else None).isfinite()
        x, good = seen.x, finite.sum()
        self.sums["rows"] += len(x)
        if x.is_cuda or int(good) < len(x):  # a GPU would have to be waited for
            x = x.masked_fill(~finite[:, None], 0)
            self.sums["dropped"] += len(x) - good
        if self.rows == "gradient":
            weight = self._weights(seen) * finite
            self.sums["weight"] += weight.sum(dtype=torch.float64)
            stretches = seen.stretches and [(v**self.power, n) for v, n in seen.stretches]
            add_weighted(self.sums["h"], x, weight, stretches)
            self._add_drift(seen, x, weight, stretches)
            return
        self.sums["weight"] += good
        first = max(self.first * seen.length, 1.0)
        if self.drift:
            weight = finite.float()
            if seen.position is not None:
                weight = weight.where(seen.position > 0, weight * first)
            stretches = seen.stretches and [(first, 1), (1.0, seen.length - 1)]
            self._add_drift(seen, x, weight, stretches)
        add_gram(self.sums["h"], x)
        if first > 1:
            self._add_first(seen, x, finite, first - 1)

    def _add_first(self, seen: Seen, x: Tensor, finite: Tensor, extra: float) -> None:
        """What the first tokens of windows weigh more than others; x [rows, in]."""
        if seen.position is None:
            raise ValueError(
                "the first token of a window cannot be weighted here\n"
                f"a layer of width {x.shape[1]} gets rows that are no tokens in order\n"
                "set first = 0.0 in the recipe"
            )
        at: Tensor | slice = slice(None, None, seen.length)
        if seen.stretches is None:
            at = (seen.position == 0).nonzero().squeeze(1)
        head = x[at].contiguous().float()
        self.sums["h"].addmm_(head.T, head, alpha=extra)
        self.sums["weight"] += finite[at].sum() * extra

    def _add_drift(
        self, seen: Seen, x: Tensor, weight: Tensor, stretches: Stretches | None
    ) -> None:
        """Add to R; x [rows, in] without rows that are not finite, weight [rows]."""
        if not self.drift or seen.original is None:
            return  # in the uncompressed model, and for rows that have no counterpart
        if exact_products(x) and stretches:
            # rounded to x's type as the inputs were, whose own rounding is the larger one
            moved = seen.original - x
            usable = moved.sum(dim=1, dtype=torch.float32).isfinite()
            moved.masked_fill_(~usable[:, None], 0)
            for share, rows, others in each_stretch(stretches, moved, x):
                part = torch.mm(rows.T, others, out_dtype=torch.float32)
                self.sums["cross"].add_(part, alpha=share)
            return
        before = seen.original.float()
        usable = before.sum(dim=1).isfinite()
        moved = torch.where(usable[:, None], before - x.float(), 0).mul_(weight[:, None])
        self.sums["cross"].addmm_(moved.T, x.float())

    def correction(self, damp: float) -> Tensor | None:
        """R (H + damp mean(diag H))^-1 [in, in] float32; None without drift or where H is singular.

        W (1 + R H^-1) are the weights that come nearest to the uncompressed output W x0 from the
        inputs x at hand (arXiv:2504.02692).
        """
        if not self.drift or not bool(self.sums["cross"].any()):
            return None
        if "correction" not in self.cache:
            H = self.matrix().double()
            H.diagonal().add_(damp * float(H.diagonal().mean()))
            H, info = torch.linalg.cholesky_ex(H)
            cross = self.sums["cross"].double().div_(float(self.sums["weight"]))
            solved = torch.cholesky_solve(cross.T, H).T.float() if int(info) == 0 else None
            self.cache["correction"] = solved
        held = self.cache["correction"]
        assert held is None or isinstance(held, Tensor)
        return held

    def _weights(self, seen: Seen) -> Tensor:
        """Weights of the rows, [rows] float32; the mean that `matrix` takes makes their scale 1."""
        if seen.weight is None:
            raise ValueError(
                "rows cannot be weighted by gradients here\n"
                f"a layer of width {seen.x.shape[1]} has no profile, or its rows are no tokens\n"
                "measure profiles first, or set rows = 'uniform' in the recipe"
            )
        return seen.weight**self.power

    def nbytes(self, columns: int) -> int:
        """The sums; a mean and a factor of the group at work come on top."""
        return 4 * columns * columns * (2 if self.drift else 1)

    def forget(self) -> None:
        """Drop the mean and its factors."""
        self.cache.clear()

    def check_rows(self, layer: str) -> None:
        """Raise Unsound where more than a tenth of the rows were dropped: no sample of the text."""
        dropped, rows = (int(self.sums[name]) for name in ("dropped", "rows"))
        if dropped > MOST_DROPPED * rows:
            raise Unsound(
                f"the activations of a layer are not finite\n{layer}: {dropped} of {rows} rows of "
                "its input hold NaN or Inf\ncheck the weights before it, or convert a model in "
                "fp16 to bf16, which has a wider range"
            )

    @property
    def empty(self) -> bool:
        """True when no row was seen: an expert that no token was routed to."""
        return float(self.sums["weight"]) == 0.0

    def matrix(self) -> Tensor:
        """H [in, in] float32, a mean over the weighted rows."""
        if "matrix" not in self.cache:
            upper = self.sums["h"].triu() / (float(self.sums["weight"]) or 1.0)
            self.cache["matrix"] = upper + upper.triu(1).T
        held = self.cache["matrix"]
        assert isinstance(held, Tensor)
        return held

    def metric(self, damp: float) -> Tensor:
        """H + damp mean(diag H) I over the inputs that were seen, [in, in] float32."""
        H = self.matrix().clone()
        live = ~dead_columns(H)
        if damp and bool(live.any()):
            H.diagonal().add_(damp * float(H.diagonal()[live].double().mean()))
        return H

    def target(self, weight: Tensor, drift: float) -> Tensor:
        """What a method should come near to instead of weight float32 [out, in].

        drift: share of the change of the inputs that is made up for.  Inputs that are always zero
        get zeros: any value is right there, and zero costs least.
        """
        moved = self.correction(DRIFT_DAMP) if drift else None
        wanted = weight.clone() if moved is None else weight + drift * (weight @ moved)
        wanted[:, dead_columns(self.matrix())] = 0
        return wanted

    def factor(self, damp: float, order: Tensor | None = None) -> tuple[Factor | None, Damping]:
        """Factor of the damped H in the column order `order`, made once for the group's layers.

        The order must be a function of H alone, as those of `gptq` are.
        """
        key = _key(damp, order)
        if key not in self.cache:
            self.cache[key] = damped_factor(self.matrix(), damp, order=order)
        held = self.cache[key]
        assert isinstance(held, tuple)
        return held  # type: ignore[return-value]


def factor_all(hessians: Sequence[Hessian], damp: float, orders: Sequence[Tensor]) -> None:
    """Make what `Hessian.factor` keeps for H of one size in their column orders [in], at once."""
    made = damped_factors([hessian.matrix() for hessian in hessians], damp, orders)
    known = torch.stack(list(orders)).cpu()
    for hessian, order, pair in zip(hessians, known, made, strict=True):
        hessian.cache[_key(damp, order)] = pair


def _key(damp: float, order: Tensor | None) -> tuple[float, bytes | None]:
    return damp, None if order is None else order.cpu().numpy().tobytes()
