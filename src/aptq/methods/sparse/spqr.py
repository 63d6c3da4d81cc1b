"""SpQR's outliers: weights whose rounding the others could not make up for (arXiv:2306.03078).

Keeps the weights with the largest (w - q)^2 / [H^-1]_jj in 16 bits; w, q [out, in] the weight and
its nearest value on the layer's grid, H [in, in] the damped second moment of the inputs.  The paper
keeps all above a threshold and has small groups with rounded scales; here the target says how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aptq.core.order import visiting_order
from aptq.core.rounding import fit, shrinks, snap
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.stats.ahead import factor_ahead
from aptq.stats.hessian import Hessian
from aptq.stats.marked import Marked


@methods.register("spqr")
@dataclass(frozen=True, kw_only=True)
class SpQR(Marked):
    """Outliers by second-order sensitivity."""

    damp: float = 0.01  # share of mean(diag H) added to the diagonal; that of GPTQ's paper
    clip: float = 0.5  # smallest share of a group's range that rounding tries; that of `aptq`
    first: float = 0.0  # weight of a window's first token as a share of the whole window's
    # weights of the rows of H: alike (the paper), or by the squared gradient of the model's loss
    rows: Literal["uniform", "gradient"] = "uniform"

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        if self.damp < 0 or not 0 < self.clip <= 1 or not 0 <= self.first < 1:
            raise ValueError(
                f"spqr: an option is out of range\ndamp = {self.damp} >= 0, clip = {self.clip} "
                f"(0..1], first = {self.first} [0..1)\ncorrect it in the recipe"
            )

    def needs(self) -> tuple[Hessian, ...]:
        """The second moment of the inputs: the same as plain `gptq` asks for."""
        return (Hessian(first=self.first, rows=self.rows),)

    def ahead(self, groups: Iterable[Sequence[Layer]]) -> None:
        """Factor the Hessians of experts together."""
        marked = ([x for x in layers if x.target.part("sparse")] for layers in groups)
        factor_ahead(marked, self.needs()[0], self.damp, "activation")

    def score(self, layer: Layer) -> Tensor | None:
        """(w - q)^2 / [H^-1]_jj."""
        hessian, grid = layer.stats.get(self.needs()[0]), layer.target.grid
        assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
        if not isinstance(hessian, Hessian) or hessian.empty:
            return None
        W = layer.weight
        # the order of `gptq`, which then finds its factor made
        order = visiting_order(hessian.matrix().diagonal(), grid, "activation")
        factor, _ = hessian.factor(self.damp, order)
        if factor is None:
            return None
        costs = torch.empty_like(factor.inner[0])
        costs[order] = factor.inner.square().sum(0).reciprocal()  # of H^-1 = U^T U the diagonal
        scales = fit(W, grid, importance=costs, shrink=shrinks(self.clip))
        return (W - snap(W, scales, grid)).square() * costs
