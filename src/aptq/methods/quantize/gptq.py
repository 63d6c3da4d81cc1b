"""GPTQ: round column by column, push each error onto the columns still free (arXiv:2210.17323).

Minimises tr((W - Q) H (W - Q)^T) over Q on the layer's grid; W, Q [out, in], H [in, in] the second
moment of the layer's inputs, or with hessian != "layer" sum_h tr(H_out E_h H E_h^T) / tr H for q, k
and v, as the attention's output sees it: APTQ (arXiv:2402.14866).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.kron import head_factors, sweep_rows
from aptq.core.linalg import Damping
from aptq.core.order import error_weights, visiting_order
from aptq.core.parts import Part, part_of
from aptq.core.plan import Target
from aptq.core.rounding import Scales, fit, shrinks, snap
from aptq.core.stack import ROW_BYTES, StackRule
from aptq.core.sweep import GridRule, sweep
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.engine.stream import stack_bytes
from aptq.stats.ahead import factor_ahead
from aptq.stats.attention import AttentionHessian
from aptq.stats.hessian import Hessian


class Problem(NamedTuple):
    """What the rows of a layer have in common."""

    W: Tensor  # [out, in] float32: what to round
    H: Tensor  # [in, in]
    U: Tensor  # [in, in] upper in visiting order, H^-1 = U^T U
    order: Tensor  # LongTensor [in]
    importance: Tensor | None  # [in] cost of a squared error in the range search


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
    # weights of the rows of H: alike; by the squared gradient of the model's loss at the layer's
    # output, by position; by what the attention makes of an error of the token
    rows: Literal["uniform", "gradient", "attention"] = "uniform"
    # share of the change of the inputs, made by compressed blocks before, that the weights make up
    # for: GPTAQ's asymmetric term (arXiv:2504.02692; 0.25 is what arXiv:2602.04929 uses) as the
    # optimum that the sweep starts from, W (1 + drift R H^-1), instead of a push a column; 0 = none
    drift: float = 0.0
    # FOEM (arXiv:2507.11017): share of a column's compensation that is taken back just before it is
    # rounded; the paper uses 0.1, GPTQModel 0.2.  It raises the objective and guards against a
    # Hessian of few tokens; 0 = plain GPTQ
    pull: float = 0.0
    # H of q, k and v: of the layer's own output; of the attention's, input side; both sides; both
    # mixed with the plain ones
    hessian: Literal["layer", "attn-in", "attn-kron", "blend"] = "layer"
    per_head: bool = False  # an input side of its own for every head, not one for all
    head_rows: int = 16  # rows of a head rounded together (arXiv:2602.04929); 1 is exact
    probes: int = 2  # backward passes a batch that estimate what has no closed form

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range and options that exclude each other."""
        if not 0 < self.clip <= 1 or self.damp < 0 or not 0 <= self.first < 1:
            raise ValueError(
                "gptq: an option is out of range\n"
                f"clip = {self.clip} (0..1], damp = {self.damp} >= 0, first = {self.first} [0..1)\n"
                "correct it in the recipe"
            )
        shares = 0 <= self.drift <= 1 and 0 <= self.pull <= 1
        if not shares or min(self.head_rows, self.probes) < 1:
            raise ValueError(
                "gptq: an option is out of range\n"
                f"drift = {self.drift} [0..1], pull = {self.pull} [0..1], head_rows = "
                f"{self.head_rows} >= 1, probes = {self.probes} >= 1\ncorrect it in the recipe"
            )
        if self.columns == "activation" and self.groups == "dynamic":
            raise ValueError(
                "gptq: columns = 'activation' scatters groups that are fitted on the way\n"
                "columns = 'activation' with groups = 'dynamic'\n"
                "use columns = 'grouped', or groups = 'static'"
            )
        if self.attentive and (self.drift or self.pull or self.groups == "dynamic"):
            raise ValueError(
                "gptq: what the attention sees goes with static groups, without drift and pull\n"
                f"hessian = {self.hessian!r}, rows = {self.rows!r}, drift = {self.drift}, pull = "
                f"{self.pull}, groups = {self.groups!r}\n"
                "use hessian = 'layer', or drift = pull = 0 and static groups"
            )

    @property
    def attentive(self) -> bool:
        """Does the Hessian look through the attention?"""
        return self.hessian != "layer" or self.rows == "attention"

    def needs(self) -> tuple[Hessian, ...]:
        """The weighted second moment of the inputs."""
        if self.rows != "attention" and self.hessian == "layer":
            return (Hessian(first=self.first, rows=self.rows, drift=self.drift > 0),)
        return (
            AttentionHessian(
                mode=self.hessian,
                first=self.first,
                rows=self.rows,
                per_head=self.per_head,
                probes=self.probes,
            ),
        )

    def seen(self, layer: Layer) -> Hessian:
        """The Hessian that the layer has been shown."""
        hessian = layer.stats[self.needs()[0]]
        assert isinstance(hessian, Hessian), type(hessian)
        return hessian

    def objective(self, layer: Layer) -> float:
        """tr(E H E^T), the mean squared change of the layer's output per weighted token."""
        error = layer.residual()
        return float(((error @ self.seen(layer).matrix()) * error).sum())

    def ahead(self, groups: Iterable[Sequence[Layer]]) -> None:
        """Factor the Hessians of experts together."""
        factor_ahead(groups, self.needs()[0], self.damp, self.columns)

    def on_layer(self, layer: Layer) -> Layer:
        """Add the part that best stands for what is left of the weight."""
        return self.on_group([layer])[0]

    def on_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """The same for layers of one input: one sweep of all their rows, where memory has room."""
        grids = [_grid(layer) for layer in layers]
        problems = [self.prepare(layer, grid) for layer, grid in zip(layers, grids, strict=True)]
        known = [problem for problem in problems if problem is not None]
        together = len(layers) > 1 and self.side_by_side(layers, grids)
        if not together or len(known) < len(layers):
            for layer, problem, grid in zip(layers, problems, grids, strict=True):
                layer.add(self.rounded(layer, problem, grid))
            return list(layers)
        tries, first = shrinks(self.clip), known[0]
        scales = [
            fit(problem.W, grid, importance=problem.importance, shrink=tries)
            for problem, grid in zip(known, grids, strict=True)
        ]
        rule = StackRule(grids, scales, first.W.shape[1])
        rows = torch.cat([problem.W for problem in known])
        swept = sweep(rows, first.U, rule, order=first.order, pull=self.pull).rounded
        parts = swept.split([len(problem.W) for problem in known])
        for layer, part, held, grid in zip(layers, parts, scales, grids, strict=True):
            layer.add(part_of(part, held, grid))
        return list(layers)

    def side_by_side(self, layers: Sequence[Layer], grids: Sequence[Grid]) -> bool:
        """Can the layers' rows be swept together?  Scales known, one Hessian, one order, memory."""
        simple = all(self.fixed(grid) and not grid.dense for grid in grids)
        simple = simple and self.columns != "grouped" and not self.attentive
        one = len({id(self.seen(layer)) for layer in layers}) == 1
        size = ROW_BYTES * sum(layer.weight.numel() for layer in layers)
        return simple and one and size <= stack_bytes(layers[0].weight.device)

    def rounded(self, layer: Layer, problem: Problem | None, grid: Grid) -> Part:
        """The part of one layer by itself; without a problem the nearest."""
        if problem is not None:
            return part_of(*self.compensate(layer, problem, grid), grid)
        W = layer.residual()
        scales = fit(W, grid, shrink=shrinks(self.clip))
        return part_of(snap(W, scales, grid), scales, grid)

    def attempt(self, layer: Layer, targets: Sequence[Target]) -> Iterator[Tensor]:
        """All candidates in few sweeps, where one order of columns fits all.

        Every third range is tried, which takes a third of the time and hardly changes an error.
        """
        grids = [target.grid for target in targets if target.grid is not None]
        simple = self.groups == "static" and self.columns != "grouped" and not self.attentive
        problem = self.prepare(layer, grids[0]) if simple and grids else None
        if problem is None or len(grids) < len(targets):
            yield from super().attempt(layer, targets)
            return
        W, U, weights = problem.W, problem.U, problem.importance
        step = max(1, stack_bytes(W.device) // (ROW_BYTES * W.numel()))
        for start in range(0, len(grids), step):
            some = grids[start : start + step]
            scales = [fit(W, g, importance=weights, shrink=shrinks(self.clip)[::3]) for g in some]
            rule = StackRule(some, scales, W.shape[1])
            many = W.repeat(len(some), 1)
            swept = sweep(many, U, rule, order=problem.order, pull=self.pull)
            yield from swept.rounded.split(len(W))

    def prepare(self, layer: Layer, grid: Grid) -> Problem | None:
        """Weights, factor and order; None, counted, where rounding to nearest must do."""
        hessian = self.seen(layer)
        hessian.check_rows(layer.name)
        H = hessian.matrix()
        order = visiting_order(H.diagonal(), grid, self.columns)
        factor, damping = hessian.factor(self.damp, order)
        if factor is None or hessian.empty:
            for name in ("fallbacks", "no rows" if hessian.empty else damping.rung, "nearest"):
                layer.counts[name] = layer.counts.get(name, 0) + 1
            return None
        W = hessian.target(layer.weight, self.drift)
        if layer.parts:  # what goes beside the codes is fixed, the optimum of the whole moves
            W -= layer.dense()
        _count(layer, hessian, damping)
        weights = error_weights(H, factor.inner, order, self.importance)
        return Problem(W, H, factor.inner, order, weights)

    def fixed(self, grid: Grid) -> bool:
        """Are all scales known before the sweep?  Groups of a super-block need each other's."""
        return self.groups == "static" or grid.group == 0 or grid.special

    def compensate(self, layer: Layer, problem: Problem, grid: Grid) -> tuple[Tensor, Scales]:
        """Rounded weight [out, in] float32 and its scales."""
        W, order, weights = problem.W, problem.order, problem.importance
        fixed, tries = self.fixed(grid), shrinks(self.clip)
        scales = fit(W, grid, importance=weights, shrink=tries) if fixed else None
        hessian = self.seen(layer)
        if scales is not None and isinstance(hessian, AttentionHessian):
            return self.by_heads(layer, problem, hessian, grid, scales), scales
        rule = GridRule(grid, (W.shape[0], W.shape[1]), scales, importance=weights, shrink=tries)
        segments = None
        if not fixed:
            owners = order // grid.group
            segments = torch.unique_consecutive(owners, return_counts=True)[1].tolist()
        swept = sweep(W, problem.U, rule, order=order, segments=segments, pull=self.pull)
        return swept.rounded, rule.scales()

    def by_heads(
        self, layer: Layer, problem: Problem, hessian: AttentionHessian, grid: Grid, scales: Scales
    ) -> Tensor:
        """Rounded weight where heads have sides of their own, else the plain sweep."""
        W, order, inner, outer = problem.W, problem.order, hessian.inner(), hessian.outer()

        def rule(ids: Tensor) -> GridRule:
            zero = None if scales.zero is None else scales.zero[ids]
            return GridRule(grid, (len(ids), W.shape[1]), Scales(scales.scale[ids], zero))

        if inner is None and outer is None:
            ids = torch.arange(len(W), device=W.device)
            return sweep(W, problem.U, rule(ids), order=order).rounded
        heads = len(inner) if outer is None and inner is not None else len(outer)
        size = len(W) // heads
        U, rows = problem.U, size
        if inner is not None:
            U, lost = head_factors(inner, self.damp, order=order.expand(heads, -1))
            layer.counts["fallbacks"] = layer.counts.get("fallbacks", 0) + lost
        side = torch.eye(size, device=W.device).expand(heads, size, size)
        if outer is not None:
            side, lost = head_factors(outer, self.damp)
            layer.counts["fallbacks"] = layer.counts.get("fallbacks", 0) + lost
            rows = min(self.head_rows, size)
        return sweep_rows(W, U, side, rule, rows=rows, order=order).rounded


def _grid(layer: Layer) -> Grid:
    assert layer.target.grid is not None, f"{layer.name} has no single grid: {layer.target}"
    return layer.target.grid


def _count(layer: Layer, hessian: Hessian, damping: Damping) -> None:
    """Leave what the report should tell."""
    layer.damping = damping.damp
    found = {
        "fallbacks": float(damping.fallbacks > 0 or bool(hessian.sums["dropped"])),
        damping.rung: float(damping.fallbacks > 0),
        "dead": float(damping.dead),
        "dropped": float(hessian.sums["dropped"]),
    }
    for name, value in found.items():
        if value:
            layer.counts[name] = layer.counts.get(name, 0) + value
