"""The Triton kernels that multiply: with packed codes, and with narrow factors beside them.

Codes become numbers as fields.py says.  For few rows of x the constants and zeros in them are taken
off the sums, by a product of x with ones in the matrix units; for more rows that would be dear, and
they are taken off every weight.  Weights are the left factor of the matrix instruction, so a batch
of one wastes 7 of its 8 columns but no time: memory is what is waited for.  Sums run in float32 and
meet the scales there.
"""

import triton
import triton.language as tl

from aptq.kernels.triton.fields import block_codes, common, numbers, offset, units_of
from aptq.kernels.triton.narrow import narrow, read, widened

FEW = tl.constexpr(16)  # rows of x from which constants are taken off every weight, not off sums


@triton.jit
def _multiplied(
    part, units, zero, xs, CODE: tl.constexpr, BITS: tl.constexpr, SUMS: tl.constexpr,
    ZERO: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """part + weights @ xs: a chunk of columns, in two products at 8 bits.

    The weights are codes less their zeros, or with SUMS codes plus offsets.
    """
    SPREAD: tl.constexpr = ZERO == 0
    FIRST: tl.constexpr = 1 if BITS == 8 else 0
    OWN: tl.constexpr = offset(BITS, CODE, FIRST, SPREAD)
    # of a symmetric grid the middle goes off with the upper half
    MIDDLE: tl.constexpr = 0 if BITS == 8 else 1 << (BITS - 1)
    LESS: tl.constexpr = -1 if SUMS else 0 if ZERO == 1 else OWN + MIDDLE
    less = 0
    if LESS == 0:
        low = zero.to(tl.int32) & 15 if BITS == 8 else zero.to(tl.int32)
        less = (-(low + OWN)).to(tl.float32).to(D)[:, None]
    w = numbers(units, less, BITS, CODE, FIRST, SPREAD, LESS, D, ASM)
    part = tl.dot(w, xs, part)
    if BITS == 8:
        UPPER: tl.constexpr = offset(BITS, CODE, 2, SPREAD)
        MORE: tl.constexpr = -1 if SUMS else 0 if ZERO == 1 else UPPER + 128
        if MORE == 0:
            less = (-((zero.to(tl.int32) >> 4 << 4) + UPPER)).to(tl.float32).to(D)[:, None]
        part = tl.dot(numbers(units, less, BITS, CODE, 2, SPREAD, MORE, D, ASM), xs, part)
    return part


@triton.constexpr_function
def surplus(bits, code, zero):
    """What numbers have more than codes, with a symmetric grid more than weights."""
    halves = (1, 2) if bits == 8 else (0,)
    found = sum(offset(bits, code, half, not zero) for half in halves)
    return found if zero else found + (1 << bits - 1)


@triton.constexpr_function
def counted(bits, code, zero):
    """What x is multiplied by for `total`: what numbers of a symmetric grid have too much, or 1."""
    return 1 if zero else surplus(bits, code, zero)


@triton.jit
def _less(part, total, zero, BITS: tl.constexpr, SUMS: tl.constexpr, ZERO: tl.constexpr):
    """Sums of numbers * x -> of (code - zero) * x, all [BN, BB]; total as `_block` makes it."""
    if SUMS:
        if ZERO:
            part -= (zero.to(tl.float32) + surplus(BITS, 0, ZERO))[:, None] * total
        else:
            part -= total
    return part


@triton.jit
def _turned(values, WARPS: tl.constexpr):
    """Values [BN] that were read in the order of `_turn`, in that of rows."""
    # 32 rows a warp: what a warp has read it also multiplies with, and nothing has to go through
    # shared memory, for which all warps would wait for each other
    if values.shape[0] == 32 * WARPS and WARPS > 1:
        values = tl.reshape(values, [WARPS, 2, 16])
        values = tl.reshape(tl.permute(values, [1, 0, 2]), [32 * WARPS])
    return values


@triton.jit
def _turn(BN: tl.constexpr, WARPS: tl.constexpr):
    """Rows of a tile in the order in which its warps multiply them: 16 of each warp in turn."""
    i = tl.arange(0, BN)
    return i // 16 % 2 * (16 * WARPS) + i // 32 * 16 + i % 16 if BN == 32 * WARPS else i


@triton.jit
def _factors(
    place, scale_at, zero_at, columns, padded, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Scales and zeros [BN] of block `place`, one of each for every run that shares them."""
    SHARED: tl.constexpr = common(GROUP, BLOCK) if GROUP else BLOCK
    found = ()
    for run in tl.static_range(BLOCK // SHARED):
        k = tl.minimum(place * BLOCK + run * SHARED, columns - 1)
        at = k // GROUP * padded if GROUP else 0
        scale, zero = tl.load(scale_at + at).to(tl.float32), tl.load(zero_at + at).to(tl.float32)
        found = found + ((_turned(scale, WARPS), _turned(zero, WARPS)),)  # noqa: RUF005
    return found


@triton.jit
def _block(
    acc, factors, place, x_at, codes_at, runs, known, columns, BITS: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, SUMS: tl.constexpr,
    EVEN: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [BN, BB] + products of block `place` of all columns, scaled but where GROUP is 0."""
    UNITS: tl.constexpr = units_of(BITS)
    CODES: tl.constexpr = block_codes(BITS)
    BLOCK: tl.constexpr = CODES * CHUNK
    SHARED: tl.constexpr = common(GROUP, BLOCK) if GROUP else BLOCK
    units = ()
    for unit in tl.static_range(UNITS):
        run = place * UNITS + unit
        # of the last block only what holds columns is stored
        run = run if EVEN else tl.minimum(run, runs - 1)
        units = units + (tl.load(codes_at + run * (16 * CHUNK)),)  # noqa: RUF005
    part, total = tl.zeros_like(acc), tl.zeros_like(acc)
    for c in tl.static_range(CODES):
        k = place * BLOCK + c * CHUNK
        factor, zero = factors[c * CHUNK // SHARED]
        if (c * CHUNK) % SHARED == 0:
            part, total = tl.zeros_like(acc), tl.zeros_like(acc)
        xs = tl.load(x_at + k, mask=known if EVEN else known & (k < columns), other=0.0)
        if not ASM:
            xs = xs.to(tl.float32)
        part = _multiplied(part, units, zero, xs, c, BITS, SUMS, ZERO, D, ASM)
        if SUMS:
            ones = tl.full([acc.shape[0], CHUNK], counted(BITS, c, ZERO), xs.dtype)
            total = tl.dot(ones, xs, total)
        if (c * CHUNK + CHUNK) % SHARED == 0:
            part = _less(part, total, zero, BITS, SUMS, ZERO)
            acc += part * factor.to(tl.float32)[:, None] if GROUP else part
    return acc


@triton.jit
def _joined(acc, counter, sums, at, size, held):
    """(is this the last program of its tile, the sums of all, in their order, if it is)."""
    tl.store(sums + tl.program_id(1) * size + at, acc, mask=held)
    tl.debug_barrier()  # all of the tile, before it counts
    last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(1) - 1
    if last:
        acc = tl.zeros_like(acc)
        for split in range(tl.num_programs(1)):
            acc += tl.load(sums + split * size + at, mask=held, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    return last, acc


@triton.jit
def _summed(
    acc, x_at, codes_at, scale_at, zero_at, first, last, runs, known, columns, padded,
    BITS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    EVEN: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """acc [BN, BB], zeros, and the products of blocks first..last-1, scaled."""
    BLOCK: tl.constexpr = block_codes(BITS) * CHUNK
    # above 16 rows of x a second product costs more than one operation for every two weights
    SUMS: tl.constexpr = acc.shape[1] <= FEW or ZERO == 2
    factors = _factors(first, scale_at, zero_at, columns, padded, GROUP, BLOCK, WARPS)
    for block in range(first, last):
        # read a block ahead: whoever waits for a scale waits for memory
        later = _factors(block + 1, scale_at, zero_at, columns, padded, GROUP, BLOCK, WARPS)
        acc = _block(
            acc, factors, block, x_at, codes_at, runs, known, columns, BITS, CHUNK, GROUP, ZERO,
            SUMS, EVEN, D, ASM,
        )  # fmt: skip
        factors = later
    if GROUP == 0:
        acc *= factors[0][0].to(tl.float32)[:, None]
    return acc


@triton.jit
def _tile(
    x, codes, counts, scale, zero, bias, parts, left, sums, y, flag, heads, second, third, runs,
    rows, out, columns, padded, per, BITS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, ALL: tl.constexpr,
    EVEN: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, SPLIT: tl.constexpr,
    ASM: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """What `multiply` does in the programs behind the first `heads`."""
    D: tl.constexpr = x.dtype.element_ty
    tile, first = tl.program_id(0) - heads, tl.program_id(1) * per
    n, b = tile * BN + tl.arange(0, BN), tl.program_id(2) * BB + tl.arange(0, BB)
    known, row = (b < rows)[None, :], tl.minimum(n, padded - 1)
    place = (row // 16 * (runs * 16 * CHUNK) + row % 16 * CHUNK)[:, None]
    codes_at = codes + place + tl.arange(0, CHUNK)[None, :]
    x_at = x + (b * columns)[None, :] + tl.arange(0, CHUNK)[:, None]
    whole, here = n < out, tl.program_id(1) == 0
    if RANK:
        # read first, for at the end nothing else would be left to do while it comes
        left_at = left + tl.arange(0, RANK)[None, :] * out + n[:, None]
        ls = tl.load(left_at, mask=(whole & here)[:, None], other=0.0)
    turned = tl.minimum(tile * BN + _turn(BN, WARPS), padded - 1)
    last = tl.minimum(first + per, tl.cdiv(columns, block_codes(BITS) * CHUNK))
    acc = _summed(
        tl.zeros([BN, BB], tl.float32), x_at, codes_at, scale + turned, zero + turned, first, last,
        runs, known, columns, padded, BITS, CHUNK, GROUP, ZERO, EVEN, D, ASM, WARPS,
    )  # fmt: skip
    if RANK:  # noqa: SIM102 (the first is for the compiler, the second for programs)
        if here:  # before the first split joins the others
            own = (tile * BN >= second).to(tl.int32) + (tile * BN >= third).to(tl.int32)
            acc = widened(
                acc, ls, parts + own * RANK, flag, heads, rows, b, known, RANK, ALL, BB, D, ASM
            )
    at, held, ends = b[None, :] * out + n[:, None], known & whole[:, None], True
    if SPLIT:
        counter = counts + tl.program_id(2) * (tl.num_programs(0) - heads) + tile
        ends, acc = _joined(acc, counter, sums, at, rows * out, held)
    if ends:
        if BIAS:
            acc += tl.load(bias + n, mask=whole, other=0.0).to(tl.float32)[:, None]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=held)
    if RANK:  # noqa: SIM102
        if here:
            read(flag, heads)


@triton.jit(do_not_specialize=["heads", "second", "third", "runs", "rows", "per"])
def multiply(
    x, codes, counts, scale, zero, bias, parts, left, right, sums, y, flags, heads, second,
    third, runs, rows, out, columns, padded, per, BITS: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr,
    ALL: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, SPLIT: tl.constexpr,
    BK: tl.constexpr, RUNS: tl.constexpr, ASM: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """y [rows, out] = x [rows, columns] @ (weight.T + right.T @ left) + bias.

    codes hold `runs` times CHUNK units a row; ZERO 0 none, 1 whole, 2 real; GROUP 0: a whole row;
    EVEN: all blocks are full.  SPLIT: programs take `per` blocks each, leave their sums in `sums`
    [splits, rows, out], and the last of a tile, known by `counts` (zeros before and after), adds
    them up.  Unless RANK is 0 the first `heads` programs share the product inner [rows, ALL] =
    x @ right.T, for which the others wait: `flags` [batch tiles, 2], zeros before and after, count
    who has written and read.  left is [RANK, out]: output rows from `second` and from `third` on
    have the second and third RANK of inner, which is rounded once.
    """
    flag = flags + 2 * tl.program_id(2)
    if RANK:
        if tl.program_id(0) < heads:
            if tl.program_id(1) == 0:
                narrow(x, right, parts, flag, rows, columns, ALL, BB, BK, RUNS, ASM)
        else:
            _tile(
                x, codes, counts, scale, zero, bias, parts, left, sums, y, flag, heads, second,
                third, runs, rows, out, columns, padded, per, BITS, CHUNK, GROUP, ZERO, BIAS, RANK,
                ALL, EVEN, BN, BB, SPLIT, ASM, WARPS,
            )  # fmt: skip
    else:
        _tile(
            x, codes, counts, scale, zero, bias, parts, left, sums, y, flag, 0, second, third,
            runs, rows, out, columns, padded, per, BITS, CHUNK, GROUP, ZERO, BIAS, RANK, ALL, EVEN,
            BN, BB, SPLIT, ASM, WARPS,
        )  # fmt: skip
