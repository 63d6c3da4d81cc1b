"""SliM-LLM: groups that matter more get a bit more, others a bit less (arXiv:2405.14917).

Minimises tr((W - Q) H (W - Q)^T); W, Q [out, in], H [in, in] the second moment of the inputs.
Groups are ranked by the sum of w_ij^2 / [H^-1]_jj; the number of those that change is searched with
rounding to nearest; the codes then come from a sweep with error compensation whose scales are
fitted to each group as it is reached.  The paper compares softmaxes of raw outputs instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aptq.core.graded import Graded, width_grid
from aptq.core.grid import Grid
from aptq.core.parts import nearest_part, part_of
from aptq.core.rounding import Scales, encode, fit, level_of, snap
from aptq.core.sweep import sweep
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.stats.ahead import factor_ahead
from aptq.stats.hessian import Hessian


@methods.register("slim")
@dataclass(frozen=True, kw_only=True)
class SliM(Stage):
    """Salience-determined bits per group and ranges weighted by salience.

    Layers whose target has one width for all groups only get the latter.
    """

    damp: float = 0.01  # share of mean(diag H) added to the diagonal; the paper's
    reach: float = 0.1  # ranges from 1 - reach to 1 + reach are tried; the paper's
    tries: int = 50  # of them on each side; the paper's
    # weight of the squared error of salient weights in that search, all others have 1; at 1, as in
    # the paper's code, salience has no influence; a guess, not tuned
    salient: float = 2.0
    share: float = 0.01  # of a group's weights that are salient; about those beyond three sigma
    first: float = 0.0  # weight of a window's first token as a share of the whole window's
    rows: Literal["uniform", "gradient"] = "uniform"  # of H: alike, or by squared output gradients

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        counts = self.tries >= 0 and 0 <= self.reach < 1 and self.salient > 0
        if not counts or self.damp < 0 or not 0 <= self.share <= 1 or not 0 <= self.first < 1:
            raise ValueError(
                f"slim: an option is out of range\ndamp = {self.damp} >= 0, reach = {self.reach} "
                f"[0..1), tries = {self.tries} >= 0, salient = {self.salient} > 0, share = "
                f"{self.share} [0..1], first = {self.first} [0..1)\ncorrect it in the recipe"
            )

    def needs(self) -> tuple[Hessian, ...]:
        """The second moment of the inputs: the same as plain `gptq` asks for."""
        return (Hessian(first=self.first, rows=self.rows),)

    def objective(self, layer: Layer) -> float:
        """tr(E H E^T)."""
        hessian = layer.stats[self.needs()[0]]
        assert isinstance(hessian, Hessian)
        error = layer.residual()
        return float(((error @ hessian.matrix()) * error).sum())

    def ahead(self, groups: Iterable[Sequence[Layer]]) -> None:
        """Factor the Hessians of experts together."""
        factor_ahead(groups, self.needs()[0], self.damp, "natural")

    def on_layer(self, layer: Layer) -> Layer:
        """Add the codes."""
        grid, hessian = layer.target.grid, layer.stats[self.needs()[0]]
        assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
        assert isinstance(hessian, Hessian)
        natural = torch.arange(layer.weight.shape[1], device=layer.weight.device)
        factor, _ = hessian.factor(self.damp, natural)
        graded = layer.target.part("graded") is not None
        if factor is None or hessian.empty or (grid.special and not graded):
            layer.counts["fallbacks"] = layer.counts.get("fallbacks", 0) + (not grid.special)
            if not graded:
                layer.add(nearest_part(layer.residual(), grid))
                return layer
        W = hessian.target(layer.residual(), 0.0)
        U = torch.eye(W.shape[1], device=W.device) if factor is None else factor.inner
        cost = U.square().sum(0).reciprocal()  # of H^-1 = U^T U the diagonal
        salience, size = W.square() * cost, grid.group or W.shape[1]
        count = -(-W.shape[1] // size)
        widths = [grid.bits] * count
        if graded:
            widths = self.widths(W, hessian.metric(self.damp), salience, grid)
            layer.counts["graded"] = sum(width != grid.bits for width in widths)
        rule = _Groups(grid, widths, size, salience, self)
        segments = [min(size, W.shape[1] - size * number) for number in range(count)]
        swept = sweep(W, U, rule, segments=segments)
        if not graded:
            layer.add(part_of(swept.rounded, rule.scales(), grid))
            return layer
        codes = torch.cat([rule.codes(n, x) for n, x in enumerate(swept.rounded.split(size, 1))], 1)
        layer.add(Graded.make(codes, rule.scales(), widths, grid))
        return layer

    def widths(self, W: Tensor, H: Tensor, salience: Tensor, grid: Grid) -> list[int]:
        """Bits of every group: the k least salient one less, the k most salient one more."""
        parts, bits = W.split(grid.group, 1), grid.bits
        total = torch.stack([part.sum() for part in salience.split(grid.group, 1)])
        order = total.argsort(stable=True).tolist()
        errors = {
            step: [part - _nearest(part, grid, bits + step) for part in parts]
            for step in (-1, 0, 1)
        }

        def plan(k: int) -> list[int]:
            steps = [0] * len(parts)
            for number in range(k):
                steps[order[number]], steps[order[-1 - number]] = -1, 1
            return steps

        def loss(k: int) -> float:
            error = torch.cat([errors[step][n] for n, step in enumerate(plan(k))], 1)
            return float(((error @ H) * error).sum())

        best = min(range(len(parts) // 2 + 1), key=loss)
        return [bits + step for step in plan(best)]


class _Groups:
    """Rounds each group to its width, with the best range for the weights as they stand then."""

    def __init__(
        self, grid: Grid, widths: Sequence[int], size: int, salience: Tensor, stage: SliM
    ) -> None:
        self.grid, self.known, self.size, self.salience = grid, widths, size, salience
        self.stage, self.found = stage, dict[int, Scales]()

    def begin(self, columns: Tensor, weight: Tensor) -> None:
        """Fit the group that begins; weight [ncols, out]."""
        number = len(self.found)
        width, stage = self.known[number], self.stage
        part = weight.T.contiguous()
        salient = self.salience[:, columns]
        least = salient.flatten().kthvalue(max(1, round(salient.numel() * (1 - stage.share))))[0]
        costs = 1.0 + (stage.salient - 1.0) * (salient > least)
        if width == 1:
            scale = ((part.abs() * costs).sum(1, True) / costs.sum(1, True)).clamp(min=2.0**-14)
            zero = torch.zeros_like(scale, dtype=torch.uint8)
            self.found[number] = Scales(scale.to(self.grid.scale_dtype), zero)
            return
        steps = [stage.reach * n / max(stage.tries, 1) for n in range(1, stage.tries + 1)]
        tries = (1.0, *(1 + s for s in steps), *(1 - s for s in steps))
        self.found[number] = fit(part, width_grid(self.grid, width), importance=costs, shrink=tries)

    def round(self, column: int, values: Tensor) -> Tensor:
        """Nearest values [out] of one column."""
        number = column // self.size
        scale, zero = self.found[number]
        step, width = scale[:, 0].float(), self.known[number]
        if width == 1:
            return torch.where(values < 0, -step, step)
        low = None if zero is None else zero[:, 0].float()
        return level_of(values / step, low, width_grid(self.grid, width)).mul_(step)

    def limits(self, column: int) -> None:
        """Widths differ: `round` is asked."""

    def scales(self) -> Scales:
        """Of all groups."""
        scales = [self.found[number] for number in range(len(self.known))]
        zeros = [found.zero for found in scales if found.zero is not None]
        scale = torch.cat([found.scale for found in scales], 1)
        return Scales(scale, torch.cat(zeros, 1) if zeros else None)

    def codes(self, number: int, rounded: Tensor) -> Tensor:
        """Codes uint8 [out, group] of a group's rounded values."""
        width = self.known[number]
        if width == 1:
            return (rounded > 0).to(torch.uint8)
        return encode(rounded, self.found[number], width_grid(self.grid, width))


def _nearest(part: Tensor, grid: Grid, width: int) -> Tensor:
    """A group rounded to nearest at a width."""
    if width == 1:
        size = part.abs().mean(1, True)
        return torch.where(part < 0, -size, size)
    one = width_grid(grid, width)
    return snap(part, fit(part, one), one)
