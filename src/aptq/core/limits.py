"""Limits: what rounding to integer grids takes, by row and group, in a form that kernels read.

A value w becomes s (clamp(round(w / s + shift), low, low + top) - shift), s its group's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aptq.core.grid import Grid

if TYPE_CHECKING:
    from aptq.core.rounding import Scales

LEAF = 64  # columns that a kernel rounds at once: with 32 rows they fill the registers of a warp


class Limits(NamedTuple):
    """Stacked weights: [groups, rows] float32 of each grid, flat, one grid behind the other.

    Column c of row r is at start[r] + c // group[r] * stride[r].
    """

    scale: Tensor
    low: Tensor  # lowest level
    shift: Tensor | None  # None where it is 0 in all rows
    start: Tensor  # int64 [rows], as the next two
    group: Tensor
    stride: Tensor
    top: Tensor  # float32 [rows]


def group_limits(grid: Grid, scales: Scales) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, lowest level and shift of one grid, each float32 [groups, out]."""
    scale = scales.scale.float().T.contiguous()
    if scales.zero is None:
        return scale, torch.full_like(scale, -(grid.levels // 2)), None
    zero = scales.zero.float().T.contiguous()
    return (scale, torch.zeros_like(scale), zero) if grid.zero == "float" else (scale, -zero, None)


def limits(grids: Sequence[Grid], scales: Sequence[Scales], columns: int) -> Limits | None:
    """Of stacked weights [out_i, columns]; None where levels are no even steps, or dense."""
    if any(grid.dense or grid.table is not None for grid in grids):
        return None
    cut = [group_limits(grid, held) for grid, held in zip(grids, scales, strict=True)]
    shift = None
    if any(one[2] is not None for one in cut):
        given = [torch.zeros_like(s) if z is None else z for s, _, z in cut]
        shift = torch.cat([z.flatten() for z in given])
    rows, start = list[Tensor](), 0
    for grid, (held, _, _) in zip(grids, cut, strict=True):
        out = held.shape[1]
        row = torch.arange(start, start + out, device=held.device)
        size = (grid.group or columns, out, grid.levels)
        rows.append(torch.stack([row, *(torch.full_like(row, x) for x in size)]))
        start += held.numel()
    at = torch.cat(rows, 1)
    scale = torch.cat([one[0].flatten() for one in cut])
    low = torch.cat([one[1].flatten() for one in cut])
    return Limits(scale, low, shift, at[0], at[1], at[2], (at[3] - 1).float())


def kernels_for(tensor: Tensor) -> bool:
    """Do the kernels of `fused` take this tensor?  They are Triton's, in float32."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and find_spec("triton") is not None
