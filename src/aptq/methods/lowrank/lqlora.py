"""LQ-LoRA: codes and factors chosen in turns, each for what the other leaves (arXiv:2311.12023).

Minimises |(W - Q - B A) S|^2 over Q on the layer's grid and B [out, rank], A [rank, in]; W, Q
[out, in], S S^T = H [in, in] the second moment of the inputs, or its diagonal: the paper weights by
the diagonal Fisher information, made solvable by a factor a row and a factor a column; here that of
the columns, with rows of H weighted by gradients, and all rows alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from aptq.core.factors import best_part, spectrum
from aptq.core.grid import Grid
from aptq.core.order import error_weights, visiting_order
from aptq.core.parts import Part, nearest_part, part_of
from aptq.core.rounding import fit, shrinks
from aptq.core.sweep import GridRule, sweep
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.stats.ahead import factor_ahead
from aptq.stats.correct import InInputs


@methods.register("lqlora")
@dataclass(frozen=True, kw_only=True)
class LQLoRA(InInputs):
    """Alternate between codes and factors as long as the loss falls; the best pair is kept.

    Layers whose target has no factors are rounded once.
    """

    rounds: int = 10  # at most; the paper's 100 end as soon as the loss rises, which is soon
    # codes of what the factors leave: the nearest (the paper), or with error compensation (GPTQ)
    codes: Literal["nearest", "compensated"] = "compensated"
    # what an error costs: by H, or by its diagonal alone (the paper, with Fisher weights)
    weights: Literal["hessian", "diagonal"] = "hessian"
    damp: float = 0.01  # share of mean(diag H) added before compensation; that of GPTQ's paper
    clip: float = 0.5  # smallest share of a group's range that is tried; that of recipe `aptq`

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        if self.rounds < 1 or self.damp < 0 or not 0 < self.clip <= 1 or not 0 <= self.first < 1:
            raise ValueError(
                f"lqlora: an option is out of range\nrounds = {self.rounds} >= 1, damp = "
                f"{self.damp} >= 0, clip = {self.clip} (0..1], first = {self.first} [0..1)\n"
                "correct it in the recipe"
            )

    def weighting(self, H: Tensor) -> Tensor:
        """H or its diagonal."""
        return H if self.weights == "hessian" else H.diagonal().diag()

    @property
    def adds(self) -> bool:
        """The codes depend on the factors."""
        return False

    def ahead(self, groups: Iterable[Sequence[Layer]]) -> None:
        """Factor the Hessians of experts together."""
        if self.codes == "compensated":
            bare = ([layer for layer in layers if not layer.coded] for layers in groups)
            factor_ahead(bare, self.needs()[0], self.damp, "activation")

    def on_layer(self, layer: Layer) -> Layer:
        """Set both parts."""
        grid, spec, found = layer.target.grid, layer.target.part("lowrank"), self.metric(layer)
        if layer.coded or grid is None or found is None:
            return super().on_layer(layer)
        wanted = self.wanted(layer) - layer.beside()  # of outliers that were kept before
        if spec is None or grid.dense:
            layer.add(self.coded(layer, wanted, grid))
            return layer if spec is None else super().on_layer(layer)
        root, H = found
        best, left = float("inf"), wanted  # left: what the codes stand for
        parts: tuple[Part, ...] = ()
        for number in range(self.rounds + 1):
            codes = self.coded(layer, left, grid)
            error = wanted - codes.dense()
            added = best_part(error, spectrum(error, root), spec, H)
            left = wanted - added.dense()
            rest = error - added.dense()
            loss = float(((rest if H is None else rest @ H) * rest).sum())
            if not loss < best:
                break
            best, parts = loss, (codes, added)
            layer.counts["rounds"] = number
        for part in parts:
            layer.add(part)
        return layer if parts else super().on_layer(layer)

    def coded(self, layer: Layer, weight: Tensor, grid: Grid) -> Part:
        """The part that stands for weight [out, in] on a grid."""
        hessian = self.seen(layer)
        assert hessian is not None, layer.name
        if grid.dense or self.codes == "nearest":
            return nearest_part(weight, grid, shrink=shrinks(self.clip))
        H = hessian.matrix()
        order = visiting_order(H.diagonal(), grid, "activation")
        factor, _ = hessian.factor(self.damp, order)
        if factor is None:
            layer.counts["fallbacks"] = layer.counts.get("fallbacks", 0) + 1
            return nearest_part(weight, grid, shrink=shrinks(self.clip))
        W = weight.clone()
        W[:, H.diagonal() <= 0] = 0
        importance = error_weights(H, factor.inner, order, "conditional")
        scales = fit(W, grid, importance=importance, shrink=shrinks(self.clip))
        rule = GridRule(grid, (W.shape[0], W.shape[1]), scales)
        rounded = sweep(W, factor.inner, rule, order=order).rounded
        return part_of(rounded, scales, grid)
