"""GPTQ: round column by column, push each error onto the columns still free (arXiv:2210.17323).

Minimises tr((W - Q) H (W - Q)^T) over Q on the layer's grid; W, Q [out, in], H [in, in] the second
moment of the layer's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.linalg import Damping, dead_columns
from aptq.core.parts import part_of
from aptq.core.rounding import Scales, fit, shrinks, snap
from aptq.core.sweep import GridRule, sweep
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.stats.hessian import Hessian


@methods.register("gptq")
@dataclass(frozen=True, kw_only=True)
class GPTQ(Stage):
    """Second-order rounding with error compensation; the defaults are those of the paper's code
    with the activation order and static groups that today's tools use.
    """

    damp: float = 0.01  # share of mean(diag H) added to the diagonal; the paper's value
    # visiting order of the columns: as they are; by diag H, largest first (act-order); the same
    # inside each group, groups by their largest (arXiv:2505.14638), for groups fitted on the way
    columns: Literal["natural", "activation", "grouped"] = "activation"
    # scales fitted to the original weights before the sweep, or to the compensated ones when the
    # sweep reaches the group; static is what llm-compressor uses with act-order
    groups: Literal["static", "dynamic"] = "static"
    clip: float = 1.0  # smallest share of a group's range that is tried; 1.0 = min-max (the paper)
    # weights of the squared error in the clip search: equal; diag H; or what an error of the
    # column costs once the later columns have made up for it, 1 / U_jj^2
    importance: Literal["equal", "diagonal", "conditional"] = "conditional"
    first: float = 0.0  # weight of a window's first token as a share of the whole window's

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range and orders that no stored format can hold."""
        if not 0 < self.clip <= 1 or self.damp < 0 or not 0 <= self.first < 1:
            raise ValueError(
                "gptq: an option is out of range\n"
                f"clip = {self.clip} (0..1], damp = {self.damp} >= 0, first = {self.first} [0..1)\n"
                "correct it in the recipe"
            )
        if self.columns == "activation" and self.groups == "dynamic":
            raise ValueError(
                "gptq: columns = 'activation' scatters groups that are fitted on the way\n"
                "columns = 'activation' with groups = 'dynamic'\n"
                "use columns = 'grouped', or groups = 'static'"
            )

    def needs(self) -> tuple[Hessian, ...]:
        """The weighted second moment of the inputs."""
        return (Hessian(first=self.first),)

    def objective(self, layer: Layer) -> float:
        """tr(E H E^T), the mean squared change of the layer's output per weighted token."""
        hessian = layer.stats[self.needs()[0]]
        assert isinstance(hessian, Hessian), type(hessian)
        error = layer.residual()
        return float(((error @ hessian.matrix()) * error).sum())

    def on_layer(self, layer: Layer) -> Layer:
        """Add the part that best stands for what is left of the weight."""
        grid = layer.target.grid
        assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
        hessian = layer.stats[self.needs()[0]]
        assert isinstance(hessian, Hessian), type(hessian)
        H, W = hessian.matrix(), layer.residual()
        dead = dead_columns(H)
        if not hessian.empty:
            W[:, dead] = 0  # inputs that are always zero: any value is right, zero costs least
        order = visiting_order(H.diagonal(), grid, self.columns)
        factor, damping = hessian.factor(self.damp, order)
        if factor is None or hessian.empty:
            layer.counts["fallbacks"] = layer.counts.get("fallbacks", 0) + 1
            scales = fit(W, grid, shrink=shrinks(self.clip))
            layer.parts.append(part_of(snap(W, scales, grid), scales, grid))
            return layer
        rounded, scales = self.compensate(W, H, factor.inner, order, grid)
        layer.parts.append(part_of(rounded, scales, grid))
        _count(layer, hessian, damping)
        return layer

    def compensate(
        self, W: Tensor, H: Tensor, U: Tensor, order: Tensor, grid: Grid
    ) -> tuple[Tensor, Scales]:
        """Sweep W [out, in] float32; U upper in visiting order, H^-1 = U^T U.  Rounded, scales."""
        weights = error_weights(H, U, order, self.importance)
        fixed = self.groups == "static" or grid.group == 0
        tries = shrinks(self.clip)
        scales = fit(W, grid, importance=weights, shrink=tries) if fixed else None
        rule = GridRule(grid, (W.shape[0], W.shape[1]), scales, importance=weights, shrink=tries)
        segments = None
        if not fixed:
            owners = order // grid.group
            segments = torch.unique_consecutive(owners, return_counts=True)[1].tolist()
        swept = sweep(W, U, rule, order=order, segments=segments)
        return swept.rounded, rule.scales()


def visiting_order(diagonal: Tensor, grid: Grid, columns: str) -> Tensor:
    """Column ids [in] in the order of the sweep; diagonal of H [in].  Ties go to the lower id."""
    count = len(diagonal)
    natural = torch.arange(count, device=diagonal.device)
    if columns == "natural":
        return natural
    inside = diagonal.argsort(descending=True, stable=True)
    if columns == "activation" or grid.group == 0:
        return inside
    owner = natural // grid.group
    peak = torch.zeros(grid.groups(count), dtype=diagonal.dtype, device=diagonal.device)
    peak.scatter_reduce_(0, owner, diagonal, "amax")
    rank = peak.argsort(descending=True, stable=True).argsort()
    return inside[rank[owner[inside]].argsort(stable=True)]


def error_weights(H: Tensor, U: Tensor, order: Tensor, importance: str) -> Tensor | None:
    """What one squared rounding error in each column costs, [in] in natural order."""
    if importance == "equal":
        return None
    if importance == "diagonal":
        return H.diagonal()
    weights = torch.empty_like(U[0])
    weights[order] = U.diagonal().square().reciprocal()
    return weights


def _count(layer: Layer, hessian: Hessian, damping: Damping) -> None:
    """Leave what the report should tell."""
    found = {
        "fallbacks": float(damping.fallbacks > 0),
        "dead": float(damping.dead),
        "dropped": float(hessian.sums["dropped"]),
    }
    for name, value in found.items():
        if value:
            layer.counts[name] = layer.counts.get(name, 0) + value
