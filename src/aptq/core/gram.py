"""Sums of squares of inputs: X^T diag(w) X [in, in] in float32, of rows x [rows, in].

Rows of 16 bits go through the matrix units of a GPU as they are: products of two of them are exact
in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Stretches = Sequence[tuple[float, int]]  # (weight, tokens) along a window
PIECE = 3 << 19  # numbers, 6 MiB
BINS = 32  # different weights of a window of 2^31 tokens, whose positions have up to 31 bits


def exact_products(x: Tensor) -> bool:
    """Are rows x multiplied in the matrix units of a GPU: exact products, float32 sums?"""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def add_gram(total: Tensor, x: Tensor, alpha: float = 1.0) -> None:
    """Add alpha x^T x to the upper triangle (in tiles) of `total` [in, in] float32; x [rows, in].

    On a GPU 16-bit rows are multiplied in the matrix units.
    """
    columns = x.shape[1]
    if exact_products(x):
        step = max(2048, -(-columns // 4))  # smaller products would not fill the device
        for a in range(0, columns, step):
            rows = x[:, a : a + step]
            part = torch.mm(rows.T, x[:, a:], out_dtype=torch.float32)
            total[a : a + step, a:].add_(part, alpha=alpha)
        return
    for rows in x.split(_piece(x)):  # type: ignore[no-untyped-call]
        _add_tiles(total, rows.T.contiguous().float(), alpha)


def _piece(x: Tensor) -> int:
    """Rows whose float32 copy a CPU's allocator has at hand: a larger one is fresh memory each
    time, which the system clears.
    """
    return max(1, len(x) if x.is_cuda else PIECE // x.shape[1])


def _add_tiles(total: Tensor, wide: Tensor, alpha: float = 1.0) -> None:
    """Add alpha X^T X; wide: X^T [in, rows] float32."""
    columns, rows = wide.shape
    # a tile row needs only the tiles from the diagonal on: 7/12 of the work with six tiles
    step = max(96, -(-columns // 6))
    for a in range(0, columns if rows else 0, step):
        total[a : a + step, a:].add_(_product(wide[a : a + step], wide[a:]), alpha=alpha)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of float32 a [n, k] and b [m, k], contiguous.

    On a CPU by oneDNN where torch has it: MKL's product, which torch would take, reaches half of
    its speed on AMD's processors (192 against 411 GFLOP/s at 576 x 2,048 x 576).
    """
    if a.is_cuda or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return a @ b.T
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


def add_weighted(
    total: Tensor, x: Tensor, weight: Tensor, stretches: Stretches | None = None
) -> None:
    """Add sum_t w_t x_t x_t^T like `add_gram`; x [rows, in], weight [rows] float32, not negative.

    A product of a weight and a 16-bit row would be rounded, so where few weights occur (profiles
    have one a bin) rows of one weight are multiplied together and their sum is weighted.
    stretches: the weights of whole windows, which finds these rows without waiting for the device.
    """
    if exact_products(x) and stretches:
        for share, rows in each_stretch(stretches, x):
            add_gram(total, rows, share)
        return
    if exact_products(x):
        values = weight.unique()  # type: ignore[no-untyped-call]
        if len(values) <= BINS:
            add_by_weight(total, x, weight, values)
            return
    step, root = _piece(x), weight.sqrt()
    pieces = zip(x.split(step), root.split(step), strict=True)  # type: ignore[no-untyped-call]
    for rows, some in pieces:
        _add_tiles(total, rows.T.contiguous() * some)


def each_stretch(stretches: Stretches, *inputs: Tensor) -> Iterator[tuple[Any, ...]]:
    """(weight, its rows of every one of the inputs [windows * length, in]) of stretches > 0."""
    start, length = 0, sum(count for _, count in stretches)
    for weight, count in stretches:
        if weight > 0 and count:
            parts = (x.reshape(-1, length, x.shape[1])[:, start : start + count] for x in inputs)
            yield weight, *(part.reshape(-1, part.shape[2]) for part in parts)
        start += count


def add_by_weight(total: Tensor, x: Tensor, weight: Tensor, values: Tensor) -> None:
    """`add_weighted` by one plain second moment for each of the different `values` of weight."""
    for value in values.tolist():
        if value > 0:
            add_gram(total, x[weight == value], value)
