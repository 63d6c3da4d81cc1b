"""The one column loop with error feedback, shared by all second-order rounding methods.

Columns are rounded one after the other; with r_j = w_j - q_j the error already made, column k
becomes w_k - sum_{j<k} r_j U[j, k] / U[j, j], which minimises tr(E H E^T) over what is still free
(GPTQ, arXiv:2210.17323; H^-1 = U^T U).  Blocks are split recursively, so that nearly all of the
work is matrix products, and a segment sees fully compensated weights when it begins.  FOEM
(arXiv:2507.11017) keeps the first-order term of the expansion: a `pull` towards the weights given.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.limits import LEAF, Limits, kernels_for, limits
from aptq.core.rounding import Scales, fit, level_of


class ColumnRule(Protocol):
    """How columns are rounded; both calls come in sweep order."""

    def begin(self, columns: Tensor, weight: Tensor) -> None:
        """A segment starts: original column ids [ncols], compensated weight.T [ncols, out]."""

    def round(self, column: int, values: Tensor) -> Tensor:
        """Rounded values [out] of one column (original id); values must not be changed."""

    def limits(self, column: int) -> Limits | None:
        """What a kernel needs to round the segment that begins with a column (original id).

        None where `round` must be asked.
        """


class Swept(NamedTuple):
    """rounded [out, in], original column order; the sum of row_loss [out] is tr(E H E^T)."""

    rounded: Tensor
    row_loss: Tensor

    @property
    def loss(self) -> float:
        """tr(E H E^T); waits for the device."""
        return float(self.row_loss.double().sum())


def _group_scales(scales: Scales, group: int) -> Scales:
    """Scales [out, 1] of one group."""
    one = slice(group, group + 1)
    return Scales(scales.scale[:, one], None if scales.zero is None else scales.zero[:, one])


class GridRule:
    """Round to a Grid with given scales, or with scales fitted when a group's segment begins."""

    def __init__(
        self,
        grid: Grid,
        shape: tuple[int, int],
        scales: Scales | None = None,
        *,
        importance: Tensor | None = None,
        shrink: Sequence[float] = (1.0,),
        power: float = 2.0,
    ) -> None:
        """scales: of a weight [out, in] = shape; None fits each group with the other options.

        importance: [in] or [out, in], >= 0, on the device of the weight.
        """
        self.grid, self.shape = grid, shape
        self.importance, self.shrink, self.power = importance, shrink, power
        self.given = scales
        self.fresh: Scales | None = None  # fitted by begin, for the group of the next column
        self.fitted: dict[int, Scales] = {}
        self.rows: dict[int, tuple[Tensor, Tensor | None]] = {}

    def _take(self, group: int, scales: Scales | None) -> None:
        assert scales is not None, f"group {group} begins in the middle of a segment"
        self.fitted[group], self.fresh = scales, None
        zero = None if scales.zero is None else scales.zero[:, 0].float()
        self.rows[group] = scales.scale[:, 0].float(), zero

    def begin(self, columns: Tensor, weight: Tensor) -> None:
        """Fit the scales of the one group that columns belong to, unless they are given."""
        if self.given is not None or self.grid.dense:
            return
        whole = replace(self.grid, group=0)
        importance = None if self.importance is None else self.importance[..., columns]
        self.fresh = fit(
            weight.T, whole, importance=importance, shrink=self.shrink, power=self.power
        )

    def round(self, column: int, values: Tensor) -> Tensor:
        """Nearest grid values [out] of one column."""
        if self.grid.dense:
            return values.bfloat16().float()
        group = column // self.grid.group if self.grid.group else 0
        if group not in self.rows:  # known here without asking the device for column ids
            given = self.given
            self._take(group, self.fresh if given is None else _group_scales(given, group))
        scale, zero = self.rows[group]
        return level_of(values / scale, zero, self.grid).mul_(scale)

    def limits(self, column: int) -> Limits | None:
        """Of the scales that are given, or that `begin` has just fitted for the column's group."""
        if self.grid.dense:
            return None
        if self.given is not None:
            return limits([self.grid], [self.given], self.shape[1])
        group = column // self.grid.group if self.grid.group else 0
        self._take(group, self.fresh)
        return limits([replace(self.grid, group=0)], [self.fitted[group]], self.shape[1])

    def scales(self) -> Scales:
        """Scales of the whole weight; every group must have begun."""
        if self.grid.dense:
            return Scales(torch.empty(self.shape[0], 0, dtype=self.grid.scale_dtype), None)
        if self.given is not None:
            return self.given
        found = [self.fitted[group] for group in range(self.grid.groups(self.shape[1]))]
        scale = torch.cat([scales.scale for scales in found], 1)
        zeros = [scales.zero for scales in found if scales.zero is not None]
        return Scales(scale, torch.cat(zeros, 1) if zeros else None)


def sweep(
    weight: Tensor,
    factor: Tensor,
    rule: ColumnRule,
    *,
    order: Tensor | None = None,
    segments: Sequence[int] | None = None,
    block: int = 32,
    pull: float = 0.0,
) -> Swept:
    """Round weight float32 [out, in] column by column, each error fed into the later columns.

    factor: U [in, in] upper with H^-1 = U^T U, in sweep order (linalg.damped_factor).
    order: LongTensor [in], original ids in sweep order; natural if None.
    segments: lengths in sweep order, their sum = in (one segment if None); rule.begin is called
    for each with its up-to-date weights.  block: columns between two matrix products, with no
    influence on the result.  Computes in the dtype of factor, float32 or (to check) float64.
    pull: beta in [0, 1]; each column, compensated to w', becomes w = w' - beta (w' - weight) once,
    just before it is rounded to q, and feeds w - q - beta (w - weight) into the later ones.
    """
    columns = weight.shape[1]
    lengths = [columns] if segments is None else list(segments)
    assert sum(lengths) == columns, (lengths, columns)
    assert min(lengths) > 0, lengths
    assert block > 0, block
    order = torch.arange(columns, device=weight.device) if order is None else order
    # A column of W is a contiguous row of W.T; unit lower triangular, so no division in the loop.
    held = weight.detach().T[order].to(factor.dtype).contiguous()
    lower = (factor / factor.diagonal().unsqueeze(1)).T
    work = _Work(
        held,
        lower if held.is_cuda else lower.contiguous(),
        order,
        order.tolist(),  # the only wait for the device before the end
        rule,
        block,
        pull,
    )
    work.segments(list(accumulate(lengths, initial=0)), 0, len(lengths))
    row_loss = work.losses(factor)
    rounded = torch.empty_like(work.weight)
    rounded[order] = work.rounded
    return Swept(rounded.T.contiguous(), row_loss)


class _Work:
    """State of one sweep: weight, rounded, error are [in, out] in sweep order."""

    def __init__(
        self,
        weight: Tensor,
        lower: Tensor,
        order: Tensor,
        ids: list[int],
        rule: ColumnRule,
        block: int,
        pull: float,
    ) -> None:
        self.weight, self.lower, self.order, self.ids = weight, lower, order, ids
        self.rule, self.block, self.pull = rule, block, pull
        self.given = weight.clone() if pull else weight
        self.rounded, self.error = torch.empty_like(weight), torch.empty_like(weight)
        self.fused = kernels_for(weight) and not pull
        self.limits: Limits | None = None  # of the segment at work, where a kernel rounds it

    def segments(self, bounds: list[int], first: int, last: int) -> None:
        """Sweep segments first..last-1; on entry their weights are up to date."""
        if last - first > 1:
            middle = (first + last) // 2
            self.segments(bounds, first, middle)
            self.push(bounds[first], bounds[middle], bounds[last])
            self.segments(bounds, middle, last)
            return
        start, stop = bounds[first], bounds[last]
        self.rule.begin(self.order[start:stop], self.weight[start:stop])
        if self.fused:
            self.limits = self.rule.limits(self.ids[start])
        self.columns(start, stop)

    def columns(self, start: int, stop: int) -> None:
        """Sweep columns start..stop-1; on entry their weights are up to date."""
        block = self.block if self.limits is None else LEAF
        if stop - start <= block:
            self.leaf(start, stop)
            return
        blocks = -(-(stop - start) // block)
        middle = start + blocks // 2 * block
        self.columns(start, middle)
        self.push(start, middle, stop)
        self.columns(middle, stop)

    def push(self, start: int, middle: int, stop: int) -> None:
        """Feed the errors of columns start..middle-1 into columns middle..stop-1."""
        factors, error = self.lower[middle:stop, start:middle], self.error[start:middle]
        self.weight[middle:stop].addmm_(factors, error, alpha=-1)

    def leaf(self, start: int, stop: int) -> None:
        """The plain loop: each column first takes up the errors of its block so far."""
        if self.limits is not None:
            from aptq.core import fused

            part = slice(start, stop)
            held = self.weight[part], self.rounded[part], self.error[part]
            fused.leaf(*held, self.lower[part, part], self.order[part], self.limits)
            return
        rows = self.weight[start:stop].unbind()
        errors = self.error[start:stop].unbind()
        lower = self.lower[start:stop, start:stop].contiguous().unbind()
        block = self.error[start:stop].T
        rounded = []
        for index, (row, error) in enumerate(zip(rows, errors, strict=True)):
            if index:
                row.addmv_(block[:, :index], lower[index][:index], alpha=-1)
            if self.pull:
                row.lerp_(self.given[start + index], self.pull)
            rounded.append(self.rule.round(self.ids[start + index], row))
            torch.sub(row, rounded[-1], out=error)
            if self.pull:
                error.add_(self.given[start + index] - row, alpha=self.pull)
        torch.stack(rounded, out=self.rounded[start:stop])

    def losses(self, factor: Tensor) -> Tensor:
        """Loss of each row [out]; overwrites error."""
        if self.pull:  # what was fed is not all of the error: E U^-1, as H = U^-1 U^-T
            error = self.rounded - self.given
            self.error = torch.linalg.solve_triangular(factor.T, error, upper=False)
        else:
            self.error.div_(factor.diagonal().unsqueeze(1))
        return self.error.square_().sum(0)
