"""Many weights in one column sweep: rows of several layers or candidate grids, stacked.

Rows do not influence each other and share the factor, so all candidates of a layer cost little more
than one: a sweep's time is its number of columns, not its number of rows.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.kquants import between
from aptq.core.limits import Limits, group_limits, limits
from aptq.core.rounding import Scales

ROW_BYTES = 28  # a column of one row: weight, error, rounded value, scale, low, high, shift


class StackRule:
    """A ColumnRule for stacked weights, each on its own grid with scales that are given."""

    def __init__(self, grids: Sequence[Grid], scales: Sequence[Scales], columns: int) -> None:
        """scales[i] of a weight [out_i, columns] on the integer grid grids[i]."""
        self.grids, self.scales, self.columns = grids, scales, columns
        self.tables: list[tuple[slice, Tensor]] = []  # rows whose levels are a table
        start = 0
        for grid, held in zip(grids, scales, strict=True):
            rows = slice(start, start := start + len(held.scale))
            if (table := grid.table) is not None:
                self.tables.append((rows, table.to(held.scale.device)))

    def limits(self, column: int) -> Limits | None:
        """Of all the scales."""
        return limits(self.grids, self.scales, self.columns)

    def begin(self, columns: Tensor, weight: Tensor) -> None:
        """Nothing to fit: scales are given."""

    @cached_property
    def _spread(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Scale, lowest and highest level, shift if any grid has one; float32 [columns, out]."""
        cut = [_by_column(g, s, self.columns) for g, s in zip(self.grids, self.scales, strict=True)]
        scale, low, high, shift = (torch.cat([c[i] for c in cut], 1) for i in range(4))
        return scale, low, high, shift if any(g.zero == "float" for g in self.grids) else None

    def round(self, column: int, values: Tensor) -> Tensor:
        """Nearest grid values [sum of out_i] of one column."""
        scales, low, high, shift = self._spread
        scale = scales[column]
        level = values / scale
        if shift is not None:
            level.add_(shift[column])
        level.round_()
        torch.maximum(level, low[column], out=level)
        torch.minimum(level, high[column], out=level)
        if shift is not None:
            level.sub_(shift[column])
        for rows, table in self.tables:
            level[rows] = table[between(values[rows] / scale[rows])]
        return level.mul_(scale)


def _by_column(grid: Grid, scales: Scales, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, lowest and highest level, shift before rounding, each float32 [columns, out]."""
    scale, low, shift = group_limits(grid, scales)
    owner = grid.group_of(columns).to(scale.device)
    shift = torch.zeros_like(scale) if shift is None else shift
    return scale[owner], low[owner], (low + (grid.levels - 1))[owner], shift[owner]
