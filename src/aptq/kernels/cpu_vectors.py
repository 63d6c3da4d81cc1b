"""The vector instructions of Lanes, as numba intrinsics: they read and write at addresses.

A word vector holds 32 bits of LANES rows of a weight; `bits` of them hold 32 codes of each row.
LLVM would vectorise a plain loop over the codes with gathers (30 times slower for 3 bits), so the
inner step is written in its vector instructions, which it fits to AVX-512, AVX2 or NEON.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from aptq.kernels.cpu_lanes import LANES, STEP

WIDTH = 16  # numbers of a vector: LANES are several
EDITION = Path(__file__).stat().st_mtime_ns  # of this file
# Bytes ahead that are asked for: processors stop at the end of a page of 4096 (measured: without
# 179 us for 2048 x 2048 int4, 1024: 173, 4096: 140, 8192: 132).
AHEAD = 8192
INT, FLOAT = ir.IntType(32), ir.FloatType()
INTS, FLOATS = ir.VectorType(INT, WIDTH), ir.VectorType(FLOAT, WIDTH)
HALVES, BYTES = (ir.VectorType(ir.IntType(size), WIDTH) for size in (16, 8))


@intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """The address as a pointer that carray takes."""

    def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), emit


@intrinsic
def take(_context: Any, address: Any) -> Any:
    """The int64 at an address, which becomes one more: no two threads get the same."""

    def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(address), emit


def _vector(builder: Any, base: Any, index: int, kind: Any) -> Any:
    """Pointer to the vector number `index` behind an address."""
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [INT(index)])


def _load(builder: Any, base: Any, index: int, kind: Any, align: int = 4) -> Any:
    found = builder.load(_vector(builder, base, index, kind))
    found.align = align
    return found


def _store(builder: Any, value: Any, base: Any, index: int) -> None:
    builder.store(value, _vector(builder, base, index, value.type)).align = 2


def _brain(builder: Any, value: Any) -> Any:
    """Finite float32 as the bits of bfloat16, to the nearest, ties to even."""
    raw = builder.bitcast(value, INTS)
    odd = builder.and_(builder.lshr(raw, _all(16)), _all(1))
    raw = builder.lshr(builder.add(builder.add(raw, _all(0x7FFF)), odd), _all(16))
    return builder.trunc(raw, HALVES)


def _all(value: int) -> Any:
    return ir.Constant(INTS, [value] * WIDTH)


def _same(builder: Any, value: Any) -> Any:
    """A vector of one float32."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, value, INT(0)), undefined, _all(0)
    )


def _nothing() -> Any:
    """What the code of a function without result returns."""
    return cgutils.get_null_value(ir.LiteralStructType([]).as_pointer())


def _fetch(builder: Any, words: Any, bits: int) -> None:
    """Ask for the words that come AHEAD bytes later; processors stop at the end of a page."""
    byte = ir.IntType(8).as_pointer()
    call = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    fetch = cgutils.get_or_insert_function(builder.module, call, "llvm.prefetch.p0")
    for line in range(bits * LANES * 4 // 64):
        place = builder.add(words, words.type(AHEAD + 64 * line))
        builder.call(fetch, [builder.inttoptr(place, byte), INT(0), INT(3), INT(1)])


def _codes(builder: Any, bits: int, words: Any, part: int) -> Iterator[Any]:
    """The 32 codes of WIDTH rows (vector `part` of LANES) as vectors of float32, one a column."""
    parts = LANES // WIDTH
    held = [_load(builder, words, word * parts + part, INTS) for word in range(bits)]
    for column in range(STEP):
        word, shift = divmod(column * bits, 32)
        code = builder.lshr(held[word], _all(shift)) if shift else held[word]
        if shift + bits > 32:  # the rest of the code begins the next word
            code = builder.or_(code, builder.shl(held[word + 1], _all(32 - shift)))
        if shift + bits != 32:
            code = builder.and_(code, _all((1 << bits) - 1))
        yield builder.sitofp(code, FLOATS)


@intrinsic(prefer_literal=True)
def accumulate(
    _context: Any, bits: Any, rows: Any, words: Any, x: Any, stride: Any, sums: Any
) -> Any:
    """sums [rows, LANES] += x [rows, STEP] @ codes [STEP, LANES], all in float32.

    Addresses; rows of x are `stride` bytes apart.  bits and rows are literals.
    """
    if not all(isinstance(count, types.IntegerLiteral) for count in (bits, rows)):
        return None  # numba asks again with literals
    width, count = bits.literal_value, rows.literal_value
    chains = max(1, min(4, 8 // count))  # sums that do not wait for each other

    def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _, _, words, x, stride, sums = args
        call = ir.FunctionType(FLOATS, [FLOATS] * 3)
        multiply = cgutils.get_or_insert_function(builder.module, call, f"llvm.fmuladd.v{WIDTH}f32")
        heads = [builder.add(x, builder.mul(stride, stride.type(row))) for row in range(count)]
        _fetch(builder, words, width)
        parts, nothing = LANES // WIDTH, ir.Constant(FLOATS, [0.0] * WIDTH)
        for part in range(parts):
            totals = [[nothing] * count for _ in range(chains)]
            for column, code in enumerate(_codes(builder, width, words, part)):
                total = totals[column % chains]
                for row in range(count):
                    value = _same(builder, _load(builder, heads[row], column, FLOAT))
                    total[row] = builder.call(multiply, [code, value, total[row]])
            for row in range(count):
                place = row * parts + part
                found = _load(builder, sums, place, FLOATS)
                for total in totals:
                    found = builder.fadd(found, total[row])
                _store(builder, found, sums, place)
        return _nothing()

    return types.void(bits, rows, words, x, stride, sums), emit


@intrinsic(prefer_literal=True)
def spread(
    _context: Any, bits: Any, half: Any, words: Any, scale: Any, zero: Any, y: Any, stride: Any
) -> Any:
    """y [STEP, LANES] = (codes - zero) * scale, bfloat16 or float32; its rows `stride` bytes apart.

    Addresses; bits and half are literals.
    """
    if not all(isinstance(count, types.IntegerLiteral) for count in (bits, half)):
        return None
    width, brain = bits.literal_value, half.literal_value

    def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _, _, words, scale, zero, y, stride = args
        for part in range(LANES // WIDTH):
            factor = _load(builder, scale, part, FLOATS)
            shift = _load(builder, zero, part, FLOATS)
            row = y
            for code in _codes(builder, width, words, part):
                value = builder.fmul(builder.fsub(code, shift), factor)
                _store(builder, _brain(builder, value) if brain else value, row, part)
                row = builder.add(row, stride)
        return _nothing()

    return types.void(bits, half, words, scale, zero, y, stride), emit


@intrinsic
def widen(_context: Any, halves: Any, brain: Any, floats: Any) -> Any:
    """floats float32 [LANES] = halves [LANES]: bfloat16 (`brain`) or finite float16.  Addresses."""

    def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        halves, brain, floats = args
        chosen = builder.icmp_signed("!=", brain, brain.type(0))
        for part in range(LANES // WIDTH):
            found = _load(builder, halves, part, HALVES, align=2)
            raw = builder.zext(found, INTS)
            # exponents of 5 bits read as those of 8 bits are 112 too small
            small = builder.shl(builder.and_(raw, _all(0x7FFF)), _all(13))
            value = builder.fmul(
                builder.bitcast(small, FLOATS), ir.Constant(FLOATS, [2.0**112] * WIDTH)
            )
            sign = builder.shl(builder.and_(raw, _all(0x8000)), _all(16))
            half = builder.or_(builder.bitcast(value, INTS), sign)
            value = builder.select(chosen, builder.shl(raw, _all(16)), half)
            _store(builder, builder.bitcast(value, FLOATS), floats, part)
        return _nothing()

    return types.void(halves, brain, floats), emit


@intrinsic
def whole(_context: Any, numbers: Any, floats: Any) -> Any:
    """floats float32 [LANES] = numbers uint8 [LANES].  Addresses."""

    def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for part in range(LANES // WIDTH):
            found = _load(builder, args[0], part, BYTES, align=1)
            _store(builder, builder.sitofp(builder.zext(found, INTS), FLOATS), args[1], part)
        return _nothing()

    return types.void(numbers, floats), emit


@intrinsic
def finish(_context: Any, sums: Any, inside: Any, scale: Any, zero: Any, y: Any) -> Any:
    """y [LANES] += scale * (sums - zero * inside); sums become 0.  Addresses, inside a float32."""

    def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums, inside, scale, zero, y = args
        inside = _same(builder, inside)
        for part in range(LANES // WIDTH):
            total, factor, shift, found = (
                _load(builder, base, part, FLOATS) for base in (sums, scale, zero, y)
            )
            value = builder.fmul(builder.fsub(total, builder.fmul(shift, inside)), factor)
            _store(builder, builder.fadd(found, value), y, part)
            _store(builder, ir.Constant(FLOATS, [0.0] * WIDTH), sums, part)
        return _nothing()

    return types.void(sums, inside, scale, zero, y), emit
