"""Machine code for Lanes, compiled by numba for this processor and kept on disk.

Only cpu_lanes.py imports this file, and only where numba is installed.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from aptq.kernels.cpu_lanes import LANES, STEP
from aptq.kernels.cpu_vectors import (
    EDITION,
    accumulate,
    finish,
    pointer,
    spread,
    take,
    whole,
    widen,
)

# What a job is, int64 each: addresses; the next tile, the one to stop at and the first; rows of x,
# columns, chunks (STEP columns), chunks that share a scale, numbers in a row of y; are scales
# bfloat16, bytes of a zero, are x and y bfloat16 (else float32).
(WORDS, SCALE, ZERO, X, Y, NEXT, STOP, FIRST, ROWS) = range(9)
(COLUMNS, CHUNKS, SPAN, STRIDE, BRAIN, ZEROS, HALF) = range(9, 16)


@njit(error_model="numpy")
def scales(job: Any, place: int, scale: int, zero: int) -> None:
    """scale, zero float32 [LANES] of one tile and group: numbers `place` * LANES and on.

    Addresses, as everywhere in a loop: arrays would be counted as they are handed on.
    """
    widen(job[SCALE] + place * 2 * LANES, job[BRAIN], scale)
    if job[ZEROS] == 2:
        widen(job[ZERO] + place * 2 * LANES, job[BRAIN], zero)
    elif job[ZEROS] == 1:
        whole(job[ZERO] + place * LANES, zero)


@njit(error_model="numpy", fastmath={"reassoc"})
def total(values: Any) -> Any:
    """Sum of values float32 [n], in the order that vectors like."""
    found = np.float32(0)
    for value in values:
        found += value
    return found


@njit(error_model="numpy")
def inputs(job: Any, groups: int) -> Any:
    """x float32 [rows, chunks * STEP], zero behind its columns, and its sums [rows, groups]."""
    rows, columns, width = job[ROWS], job[COLUMNS], job[SPAN] * STEP
    x = np.zeros((rows, job[CHUNKS] * STEP), np.float32)
    sums = np.empty((rows, groups), np.float32)
    for row in range(rows):
        if job[HALF]:
            halves = carray(pointer(job[X] + row * columns * 2), columns, np.uint16)
            raw = x[row].view(np.int32)
            for i in range(columns):
                raw[i] = np.int32(halves[i]) << 16
        else:
            x[row, :columns] = carray(pointer(job[X] + row * columns * 4), columns, np.float32)
        for group in range(groups):
            sums[row, group] = total(x[row, group * width : (group + 1) * width])
    return x, sums


@njit(error_model="numpy")
def outputs(job: Any, first: int, y: Any) -> None:
    """Columns `first` and on of the output become y float32 [rows, LANES], as many as there are."""
    shape, count = (job[ROWS], job[STRIDE]), min(LANES, job[STRIDE] - first)
    if job[HALF]:
        halves, raw = carray(pointer(job[Y]), shape, np.uint16), y.view(np.int32)
        for row in range(len(y)):
            for i in range(count):  # to the nearest, ties to even
                bits = raw[row, i]
                halves[row, first + i] = np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        carray(pointer(job[Y]), shape, np.float32)[:, first : first + count] = y[:, :count]


@cache
def product(bits: int) -> Any:
    """The function of one thread for y = x @ weight.T: it takes tiles until there are none."""

    edition = EDITION  # closed over, so that a change of that file is known to numba's cache

    def work(address: Any) -> None:
        job = carray(address, 16 if edition else 0, np.int64)
        rows, chunks, span = job[ROWS], job[CHUNKS], job[SPAN]
        groups = (chunks + span - 1) // span
        x, inside = inputs(job, groups)
        sums, y = np.zeros((rows, LANES), np.float32), np.empty((rows, LANES), np.float32)
        scale, zero = np.empty(LANES, np.float32), np.full(LANES, 1 << (bits - 1), np.float32)
        stride, size, to, out = chunks * STEP * 4, LANES * 4, sums.ctypes.data, y.ctypes.data
        head, factor, shift = x.ctypes.data, scale.ctypes.data, zero.ctypes.data
        while True:
            tile = take(job.ctypes.data + 8 * NEXT)
            if tile >= job[STOP]:
                break
            y[:] = 0
            for group in range(groups):
                for chunk in range(group * span, min((group + 1) * span, chunks)):
                    words = job[WORDS] + (tile * chunks + chunk) * bits * size
                    at, row = head + chunk * STEP * 4, 0
                    while row + 8 <= rows:
                        accumulate(bits, 8, words, at + row * stride, stride, to + row * size)
                        row += 8
                    if row + 4 <= rows:
                        accumulate(bits, 4, words, at + row * stride, stride, to + row * size)
                        row += 4
                    if row + 2 <= rows:
                        accumulate(bits, 2, words, at + row * stride, stride, to + row * size)
                        row += 2
                    if row < rows:
                        accumulate(bits, 1, words, at + row * stride, stride, to + row * size)
                scales(job, tile * groups + group, factor, shift)
                for row in range(rows):
                    at = row * size
                    finish(to + at, inside[row, group], factor, shift, out + at)
            outputs(job, tile * LANES, y)

    return _compiled(work)


@cache
def decoded(bits: int) -> Any:
    """The function of one thread for y [chunks * STEP, stride] = weight.T of some tiles."""

    edition = EDITION  # closed over, so that a change of that file is known to numba's cache

    def work(address: Any) -> None:
        job = carray(address, 16 if edition else 0, np.int64)
        chunks, span = job[CHUNKS], job[SPAN]
        groups, size = (chunks + span - 1) // span, LANES * 4
        width = job[STRIDE] * (2 if job[HALF] else 4)
        scale, zero = np.empty(LANES, np.float32), np.full(LANES, 1 << (bits - 1), np.float32)
        factor, shift = scale.ctypes.data, zero.ctypes.data
        while True:
            tile = take(job.ctypes.data + 8 * NEXT)
            if tile >= job[STOP]:
                break
            for chunk in range(chunks):
                if chunk % span == 0:
                    scales(job, tile * groups + chunk // span, factor, shift)
                words = job[WORDS] + (tile * chunks + chunk) * bits * size
                y = job[Y] + chunk * STEP * width
                if job[HALF]:
                    y += (tile - job[FIRST]) * LANES * 2
                    spread(bits, 1, words, factor, shift, y, width)
                else:
                    y += (tile - job[FIRST]) * LANES * 4
                    spread(bits, 0, words, factor, shift, y, width)

    return _compiled(work)


def _compiled(work: Callable[..., None]) -> Any:
    signature = types.void(types.voidptr)
    try:
        return cfunc(signature, cache=True)(work)
    except RuntimeError:  # no folder that can be written: compiled anew in every process
        return cfunc(signature)(work)
