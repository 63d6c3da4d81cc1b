"""Kernels for loops that are bound by their launches on a GPU.  Only imported there: needs Triton.

They compute what the loops beside their callers compute, in float32, in another order of sums.
"""

# mypy: ignore-errors
# Triton's language has no types: what looks like Python here is compiled for the GPU.

import torch
import triton
import triton.language as tl
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.limits import LEAF, Limits

ROWS = 32  # of a leaf of the sweep: those of a warp
TILE = 2048  # weights whose range one program searches
WIDEST = 1024  # columns of a group that fit into such a tile
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 below 2^22, half to even


@triton.jit
def _leaf(
    weight, rounded, error, lower, order, scale, low, shift, start, group, stride, top,
    rows, down, right,
    SHIFT: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    i = tl.arange(0, B)
    live = r < rows
    first, across = tl.load(start + r, live, 0), tl.load(group + r, live, 1)
    step, most = tl.load(stride + r, live, 0), tl.load(top + r, live, 0.0)
    at, mask = r.to(tl.int64), (i < SIZE)[:, None] & live[None, :]
    tile = tl.load(weight + at[None, :] + i[:, None].to(tl.int64) * rows, mask, 0.0)
    for j in range(SIZE):
        value = tl.sum(tl.where(i[:, None] == j, tile, 0.0), 0)
        place = first + tl.load(order + j) // across * step
        s, least = tl.load(scale + place, live, 1.0), tl.load(low + place, live, 0.0)
        level = tl.div_rn(value, s)
        if SHIFT:
            z = tl.load(shift + place, live, 0.0)
            level += z
        level = tl.minimum(tl.maximum(level, least), least + most)
        level = (level + ROUND) - ROUND
        if SHIFT:
            level -= z
        nearest = level * s
        wrong = value - nearest
        tl.store(rounded + at, nearest, live)
        tl.store(error + at, wrong, live)
        at += rows
        later = (i > j) & (i < SIZE)
        tile -= tl.load(lower + i * down + j * right, later, 0.0)[:, None] * wrong[None, :]


def leaf(
    weight: Tensor, rounded: Tensor, error: Tensor, lower: Tensor, order: Tensor, limits: Limits
) -> None:
    """Round some columns (at most LEAF) of weight [columns, out] as `sweep` does.

    Fills rounded and error [columns, out]; all contiguous but lower [columns, columns].  order:
    their original ids.
    """
    columns, rows = weight.shape
    with torch.cuda.device_of(weight):
        _leaf[triton.cdiv(rows, ROWS),](
            weight, rounded, error, lower, order, limits.scale, limits.low,
            limits.low if limits.shift is None else limits.shift,
            limits.start, limits.group, limits.stride, limits.top,
            rows, lower.stride(0), lower.stride(1),
            SHIFT=limits.shift is not None, SIZE=columns, B=LEAF, R=ROWS, num_warps=1,
        )  # fmt: skip


@triton.jit
def _fit(
    weight, root, shares, scale, zero, rows, columns, groups, skip, least, largest, top,
    TRIES: tl.constexpr, ZERO: tl.constexpr, ROOT: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live, g = r < rows, tl.program_id(1)
    at = (g * G + tl.arange(0, G))[None, :]
    x = tl.load(weight + r[:, None] * columns + at, live[:, None], 0.0)
    if ROOT:
        weigh = tl.load(root + r[:, None] * skip + at, live[:, None], 0.0)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    bottom, end = 0.0, tl.div_rn(high - low, top + tl.zeros_like(low))
    if ZERO == 0:
        half = (top + 1) / 2
        bottom, end = -half, -tl.where(high > -low, high, low) / half
    best = tl.full([R], float("inf"), tl.float32)
    found, kept = tl.zeros_like(best), tl.zeros_like(best)
    for number in range(TRIES):
        share = tl.load(shares + number)
        s = end * share
        size = tl.minimum(tl.maximum(tl.abs(s), least), largest)
        s = tl.where(s < 0, -size, size).to(scale.dtype.element_ty).to(tl.float32)
        s = tl.where(low == high, 1.0, s)
        exact, z = x * tl.div_rn(tl.full([R], 1.0, tl.float32), s)[:, None], tl.zeros_like(best)
        if ZERO > 0:
            z = tl.minimum(tl.maximum(tl.div_rn(-low * share, s), 0.0), top)
            z = (z + ROUND) - ROUND if ZERO == 1 else z.to(scale.dtype.element_ty).to(tl.float32)
            exact += z[:, None]
        wrong = tl.minimum(tl.maximum(exact, bottom), bottom + top)
        wrong = ((wrong + ROUND) - ROUND) - exact
        if ROOT:
            wrong *= weigh
        loss = tl.sqrt(tl.sum(wrong * wrong, 1)) * tl.abs(s)
        better = loss < best
        best = tl.where(better, loss, best)
        found, kept = tl.where(better, s, found), tl.where(better, z, kept)
    tl.store(scale + r * groups + g, found.to(scale.dtype.element_ty), live)
    if ZERO > 0:
        tl.store(zero + r * groups + g, kept.to(zero.dtype.element_ty), live)


def fits(grid: Grid, columns: int, power: float) -> bool:
    """Does `fit` know this grid, for rows of so many columns?"""
    size = grid.group or columns
    whole = 0 < size <= WIDEST and size & (size - 1) == 0 and columns % size == 0
    return whole and power == 2.0 and not grid.dense and not grid.special


def fit(
    weight: Tensor, grid: Grid, root: Tensor | None, shares: Tensor, scale: Tensor,
    zero: Tensor | None, least: float,
) -> None:  # fmt: skip
    """Fill scale and zero [out, groups] for weight [out, in], the best of shares [tries].

    root: square roots of what an error costs, [out, in], rows perhaps of stride 0.
    """
    rows, columns = weight.shape
    size = grid.group or columns
    tile, kind = max(1, TILE // size), {"none": 0, "int": 1, "float": 2}[grid.zero]
    known = weight if root is None else root
    with torch.cuda.device_of(weight):
        _fit[triton.cdiv(rows, tile), columns // size](
            weight, known, shares, scale, scale if zero is None else zero,
            rows, columns, columns // size, known.stride(0), least,
            torch.finfo(scale.dtype).max, float(grid.levels - 1),
            TRIES=len(shares), ZERO=kind, ROOT=root is not None, G=size, R=tile, num_warps=4,
        )  # fmt: skip


@triton.jit
def _climb(codes, residual, steps, hessian, toward, diagonal, total, columns, top, N: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    live, at = i < columns, tl.program_id(0).to(tl.int64) * columns + i
    code, R = tl.load(codes + at, live, 0.0), tl.load(residual + at, live, 0.0)
    step, own = tl.load(steps + at, live, 1.0), tl.load(diagonal + i, live, 0.0)
    rate = tl.div_rn(tl.load(toward + i, live, 0.0), step)
    worth, left, won = own * step * step, columns + 0, tl.full([], 0.0, tl.float32)
    while left > 0:
        wanted = rate * R
        # what is far beyond the codes ends at the last of them, and ROUND takes no large numbers
        move = tl.minimum(tl.maximum(wanted, -code), top - code)
        move = (move + ROUND) - ROUND
        gains = tl.where(live, (2.0 * wanted - move) * move * worth, 0.0)
        gain, best = tl.max(gains, 0), tl.argmax(gains, 0)
        chosen = tl.where(i == best, move, 0.0)
        code += chosen
        moved = tl.sum(chosen * step, 0)
        R += tl.load(hessian + best.to(tl.int64) * columns + i, live, 0.0) * moved
        won += gain
        left = tl.where(gain > 0.0, left - 1, 0)
    tl.store(codes + at, code, live)
    tl.store(residual + at, R, live)
    tl.store(total + row, won)


def climb(
    codes: Tensor, residual: Tensor, step: Tensor, H: Tensor, toward: Tensor, top: int
) -> Tensor:
    """The best single moves of every row until it has none, at most as many as columns.

    codes and residual [rows, in] are changed, all contiguous; toward [in]: what a residual over its
    step is multiplied by.  The gain of each row, [rows].
    """
    total, columns = residual.new_zeros(len(codes)), codes.shape[1]
    size = triton.next_power_of_2(columns)
    with torch.cuda.device_of(codes):
        _climb[len(codes),](
            codes, residual, step, H, toward, H.diagonal().contiguous(), total, columns, float(top),
            N=size, num_warps=min(16, max(1, size // 256)),
        )  # fmt: skip
    return total
