"""All that is ever done with a grid: fit its scales, encode, decode, snap.

Arithmetic is float32; scales (and float zeros) are rounded to their stored dtype before any code
is computed, so what is simulated is what is stored.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from aptq.core import kquants
from aptq.core.grid import Grid
from aptq.core.limits import kernels_for

CACHE_TILE = 1 << 16  # weights searched at once on a CPU: the working set stays in its L2 cache
DEVICE_TILE = 1 << 24  # on a GPU: few launches, and at most 64 MiB for a temporary


class Scales(NamedTuple):
    """Scales of one weight on one grid.

    scale [out, groups] in grid.scale_dtype, never 0 or infinite, negative on some zero-less grids.
    zero: None | uint8 [out, groups] codes (grid.zero "int") | scale_dtype [out, groups] ("float").
    """

    scale: Tensor
    zero: Tensor | None


def shrinks(least: float, step: float = 0.025) -> tuple[float, ...]:
    """Shares of a group's range to try: 1, 1 - step, ... down to `least`."""
    return tuple(1.0 - step * index for index in range(int((1.0 - least) / step + 1e-9) + 1))


def fit(
    weight: Tensor,
    grid: Grid,
    *,
    importance: Tensor | None = None,
    shrink: Sequence[float] = (1.0,),
    power: float = 2.0,
) -> Scales:
    """Scales for weight float32 [out, in]: the range of each group, or the best shrunk range.

    shrink: factors p tried on both ends of the range; per (row, group) the p with the smallest
    sum importance * |q - x|^power wins, the earlier one on a tie.  importance: [in] or [out, in],
    >= 0.  With a zero: ends min(0, min), max(0, max), scale = (hi - lo) p / (2^b - 1).  Without:
    the element of largest magnitude falls on the lowest level, scale = -x* p / 2^(b-1).
    All-zero groups get scale 1 and decode to exact zeros.  A dense grid has no scales ([out, 0]).
    Super-block types have a search of their own (kquants.fit).
    Source of the clip search: GPTQ's reference code (arXiv:2210.17323), "mse".
    """
    assert len(shrink) > 0
    weight = weight.detach()
    if grid.kind is not None:
        scale, low = kquants.fit(weight, grid.kind, importance=importance).effective(grid.kind)
        return Scales(scale, low / scale if grid.kind.minimum else None)
    rows, columns = weight.shape
    if grid.table is not None:
        scale = kquants.table_scales(weight, importance)
        return Scales(_storable(scale, grid.scale_dtype).masked_fill_(scale == 0, 1.0), None)
    scale = weight.new_empty((rows, grid.groups(columns)), dtype=grid.scale_dtype)
    if grid.dense:
        return Scales(scale, None)
    zero = None
    if grid.zero != "none":
        zero = torch.empty_like(scale, dtype=torch.uint8 if grid.zero == "int" else None)
    factors = torch.tensor(shrink, dtype=torch.float32, device=weight.device)
    if importance is not None:
        importance = importance.to(factors).pow(1.0 / power).expand(rows, columns)
    if kernels_for(weight):
        from aptq.core import fused

        if fused.fits(grid, columns, power):
            least = _least(grid.scale_dtype)
            fused.fit(weight.contiguous(), grid, importance, factors, scale, zero, least)
            return Scales(scale, zero)
    _fill(Scales(scale, zero), weight, grid, factors, importance, power)
    return Scales(scale, zero)


def _fill(
    held: Scales, weight: Tensor, grid: Grid, factors: Tensor, root: Tensor | None, power: float
) -> None:
    """Search the ranges of all groups; root [out, in]: importance^(1 / power)."""
    rows, columns = weight.shape
    tile = max(1, (CACHE_TILE if weight.device.type == "cpu" else DEVICE_TILE) // columns)
    for start in range(0, rows, tile):
        band = slice(start, start + tile)
        roots = _blocks(root[band], grid) if root is not None else None
        for ids, part in _blocks(weight[band].float(), grid):
            own = next(roots)[1] if roots is not None else None
            found = _search(part, grid, factors, own, power)
            held.scale[band, ids] = found.scale
            if held.zero is not None:
                held.zero[band, ids] = cast(Tensor, found.zero)


def encode(
    weight: Tensor, scales: Scales, grid: Grid, *, columns: slice | Tensor = slice(None)
) -> Tensor:
    """Nearest codes, uint8 [out, ncols], of weight [out, ncols].

    columns: the original ids (slice or LongTensor) of the columns that weight holds; all of them
    if not given.
    """
    assert not grid.dense, grid
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for part, scale, zero, out in _aligned(weight, scales, grid, columns, codes):
        level = level_of(part / scale, zero, grid)
        if (table := grid.table) is not None:
            out.copy_(torch.searchsorted(table.to(level), level))
            continue
        # (code - zero) + zero is exact in float32 for every float16 and bfloat16 zero (all tried);
        # zeros of super-blocks are float32
        level.add_(code_offset(zero, grid))
        out.copy_(level if grid.kind is None else level.round_())
    return codes


def decode(
    codes: Tensor,
    scales: Scales,
    grid: Grid,
    *,
    columns: slice | Tensor = slice(None),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values [out, ncols] of uint8 codes [out, ncols]; computed in float32, returned in dtype."""
    assert not grid.dense, grid
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part, scale, zero, out in _aligned(codes, scales, grid, columns, values):
        exact = out if dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        if (table := grid.table) is not None:
            exact.copy_(table.to(part.device)[part.long()]).mul_(scale)
        else:
            exact.copy_(part).sub_(code_offset(zero, grid)).mul_(scale)
        if exact is not out:
            out.copy_(exact)
    return values


def snap(
    weight: Tensor,
    scales: Scales,
    grid: Grid,
    *,
    columns: slice | Tensor = slice(None),
    ste: bool = False,
) -> Tensor:
    """Weight float32 [out, ncols] rounded to the grid: decode(encode(weight)).

    ste: gradients pass straight through the rounding (identity), none flow into the scales.
    """
    with torch.no_grad():
        if grid.dense:
            snapped = weight.to(torch.bfloat16).to(weight.dtype)
        else:
            codes = encode(weight, scales, grid, columns=columns)
            snapped = decode(codes, scales, grid, columns=columns, dtype=weight.dtype)
    # x + (q - x) is not q in floating point, but q + (x - x) is.
    return snapped + (weight - weight.detach()) if ste else snapped


def level_of(values: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Nearest code minus code_offset for values = weight / scale, in float32 and in place.

    zero: float32, broadcasts against values.  A whole zero is kept out of the rounding, so that
    ties do not depend on it.
    """
    if (table := grid.table) is not None:
        table = table.to(values)
        return values.copy_(table[kquants.between(values)])
    if zero is None:
        half = grid.levels // 2
        return values.round_().clamp_(-half, half - 1)
    if grid.zero == "int":
        values.round_().add_(zero)
    else:
        values.add_(zero).round_()
    # clamping to -zero and levels - 1 - zero would save two calls, but clamp_ is slow on broadcasts
    return values.clamp_(0, grid.levels - 1).sub_(zero)


def code_offset(zero: Tensor | None, grid: Grid) -> Tensor | int:
    """What a stored code exceeds its level by: w = (code - offset) * scale."""
    return grid.levels // 2 if zero is None else zero


def _search(part: Tensor, grid: Grid, factors: Tensor, root: Tensor | None, power: float) -> Scales:
    """Best Scales [rows, groups] of part [rows, groups, size] over the range factors [tries]."""
    tries = _ranges(part, grid, factors)
    if len(factors) == 1:
        return Scales(tries.scale[0], None if tries.zero is None else tries.zero[0])
    part = part.contiguous()  # reductions over a strided group are many times slower
    scale = tries.scale.float().unsqueeze(-1)
    offset = None if tries.zero is None else tries.zero.float().unsqueeze(-1)
    low, high = (
        (0, grid.levels - 1) if offset is not None else (-grid.levels // 2, grid.levels // 2 - 1)
    )
    inverse = scale.reciprocal()
    error = torch.empty(scale.shape[:-1], device=part.device)
    exact, level = torch.empty_like(part), torch.empty_like(part)
    for index in range(len(factors)):
        # In units of the scale, which saves decoding; few calls, all of them in the cache.
        torch.mul(part, inverse[index], out=exact)
        if offset is not None:
            exact.add_(offset[index])
        torch.round(exact, out=level).clamp_(low, high).sub_(exact)
        if root is not None:
            level.mul_(root)
        error[index] = _norm(level, power).mul_(scale[index].squeeze(-1).abs())
    best = error.argmin(dim=0, keepdim=True)
    zero = None if tries.zero is None else tries.zero.gather(0, best)[0]
    return Scales(tries.scale.gather(0, best)[0], zero)


def _norm(error: Tensor, power: float) -> Tensor:
    """(sum |error|^power)^(1/power) over the last dimension; overwrites error."""
    total: Tensor
    if power == 2.0:
        total = torch.linalg.vector_norm(error, dim=-1)
        return total
    # |e|^p as 2^(p/2 log2 e^2), vectorised; pow and the general norm are four times slower.
    powers = error.square_().log2_().mul_(power / 2).exp2_()
    return powers.sum(-1).pow_(1.0 / power)


def _ranges(part: Tensor, grid: Grid, factors: Tensor) -> Scales:
    """Scales [tries, rows, groups] of part [rows, groups, size] with its range times factors."""
    low, high = part.amin(-1).clamp_(max=0), part.amax(-1).clamp_(min=0)
    factors = factors.view(-1, 1, 1)
    empty = low == high
    if grid.zero == "none":
        ends = torch.where(high > -low, high, low).neg_().div_(grid.levels // 2)
    else:
        ends = (high - low).div_(grid.levels - 1)
    scale = _storable(ends * factors, grid.scale_dtype).masked_fill_(empty, 1.0)
    if grid.zero == "none":
        return Scales(scale, None)
    # The range starts at low * p; scale is already the rounded one.
    zero = (-low * factors).div_(scale.float())
    if grid.zero == "int":
        return Scales(scale, zero.round_().clamp_(0, grid.levels - 1).to(torch.uint8))
    return Scales(scale, zero.clamp_(0, grid.levels - 1).to(grid.scale_dtype))


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale in dtype, moved to the nearest usable magnitude where it would become 0 or inf."""
    most = torch.finfo(dtype).max
    return scale.abs().clamp_(_least(dtype), most).copysign_(scale).to(dtype)


def _least(dtype: torch.dtype) -> float:
    # bfloat16 subnormals are float32 subnormals, which some devices flush to zero.
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def _blocks(matrix: Tensor, grid: Grid) -> Iterator[tuple[slice, Tensor]]:
    """Views [rows, groups, size] of matrix [rows, columns]: whole groups, then a shorter one."""
    rows, columns = matrix.shape
    size = grid.group or columns
    whole = columns // size
    if whole:
        yield slice(0, whole), matrix[:, : whole * size].view(rows, whole, size)
    if columns % size:
        yield slice(whole, whole + 1), matrix[:, whole * size :].unsqueeze(1)


def _aligned(
    source: Tensor, scales: Scales, grid: Grid, columns: slice | Tensor, out: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Pieces of source and out with the float32 scale and zero that broadcast against them."""
    scale, zero = scales.scale.float(), None if scales.zero is None else scales.zero.float()
    if isinstance(columns, slice) and columns == slice(None):
        for (ids, part), (_, view) in zip(_blocks(source, grid), _blocks(out, grid), strict=True):
            offset = None if zero is None else zero[:, ids].unsqueeze(-1)
            yield part, scale[:, ids].unsqueeze(-1), offset, view
        return
    if isinstance(columns, slice):
        start, step = columns.start or 0, columns.step or 1
        columns = start + step * torch.arange(source.shape[1], device=source.device)
    group = columns // grid.group if grid.group else torch.zeros_like(columns)
    yield source, scale[:, group], None if zero is None else zero[:, group], out
