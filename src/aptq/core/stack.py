"""Many weights in one column sweep: rows of several layers or candidate grids, stacked.

Rows do not influence each other and share the factor, so all candidates of a layer cost little more
than one: a sweep's time is its number of columns, not its number of rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.kquants import between
from aptq.core.rounding import Scales

ROW_BYTES = 28  # a column of one row: weight, error, rounded value, scale, low, high, shift


class StackRule:
    """A ColumnRule for stacked weights, each on its own grid with scales that are given."""

    def __init__(self, grids: Sequence[Grid], scales: Sequence[Scales], columns: int) -> None:
        """scales[i] of a weight [out_i, columns] on the integer grid grids[i]."""
        shift = any(grid.zero == "float" for grid in grids)
        cut = [_limits(g, s, columns) for g, s in zip(grids, scales, strict=True)]
        self.scale, self.low, self.high = (torch.cat([c[i] for c in cut], 1) for i in range(3))
        self.shift = torch.cat([c[3] for c in cut], 1) if shift else None
        self.tables: list[tuple[slice, Tensor]] = []  # rows whose levels are a table
        start = 0
        for grid, held in zip(grids, scales, strict=True):
            rows = slice(start, start := start + len(held.scale))
            if (table := grid.table) is not None:
                self.tables.append((rows, table.to(held.scale.device)))

    def begin(self, columns: Tensor, weight: Tensor) -> None:
        """Nothing to fit: scales are given."""

    def round(self, column: int, values: Tensor) -> Tensor:
        """Nearest grid values [sum of out_i] of one column."""
        scale = self.scale[column]
        level = values / scale
        if self.shift is not None:
            level.add_(self.shift[column])
        level.round_()
        torch.maximum(level, self.low[column], out=level)
        torch.minimum(level, self.high[column], out=level)
        if self.shift is not None:
            level.sub_(self.shift[column])
        for rows, table in self.tables:
            level[rows] = table[between(values[rows] / scale[rows])]
        return level.mul_(scale)


def _limits(grid: Grid, scales: Scales, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, lowest and highest level, shift before rounding, each float32 [columns, out]."""
    group = grid.group_of(columns).to(scales.scale.device)
    scale = scales.scale.float().T[group].contiguous()
    if scales.zero is None:
        half = grid.levels // 2
        low = torch.full_like(scale, -half)
        return scale, low, torch.full_like(scale, half - 1), torch.zeros_like(scale)
    zero = scales.zero.float().T[group].contiguous()
    if grid.zero == "float":
        low = torch.zeros_like(scale)
        return scale, low, torch.full_like(scale, grid.levels - 1), zero
    return scale, -zero, grid.levels - 1 - zero, torch.zeros_like(scale)
