"""The Triton kernels: products with packed codes, sums of partial products, decoded weights.

A 16-bit unit with its field moved into the mantissa and a fixed exponent is a number 2^e + code,
so two weights (neighbouring units of a register) cost a shift, one logical operation and, in the
upper plane alone, one subtraction of zero and of both planes' 2^e.  It is exact: all values are
whole and at most 256.  The planes are multiplied one after the other and meet in the sum.  Weights
are the left factor of the matrix instruction, so a batch of one wastes 7 of its 8 columns but no
time: memory is what is waited for.  Sums run in float32 and meet the scales there.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _pattern(bits, up, bf16):
    """(exponent pattern of 2^(bits + up), bits of mantissa) of bfloat16 or float16."""
    mantissa, bias = (7, 127) if bf16 else (10, 15)
    return (bias + bits + up) << mantissa, mantissa


@triton.constexpr_function
def _asm(field, bits, up, bf16, fixed):
    """PTX for two units ($1) -> two numbers ($0) plus a constant, what $2 holds or, at -1, nothing.

    fixed: the bits of the constant in both halves' type, 0 for $2.
    """
    magic, mantissa = _pattern(bits, up, bf16)
    shift = field * bits - (mantissa - bits)
    move = f"{'shr' if shift > 0 else 'shl'}.b32 t, $1, {abs(shift)};"
    mask = (((1 << bits) - 1) << (mantissa - bits)) * 0x10001
    less = f"{fixed * 0x10001:#x}" if fixed else "$2"
    take = "fma.rn.bf16x2 $0, t, o, z;" if bf16 else "add.f16x2 $0, t, z;"
    if fixed < 0:
        less, take = "0", "mov.b32 $0, t;"
    return (
        f"{{ .reg .b32 t, m, o, z; {move} mov.b32 m, {magic * 0x10001:#x};"
        f" lop3.b32 t, t, {mask:#x}, m, 0xea; mov.b32 o, 0x3f803f80; mov.b32 z, {less}; {take} }}"
    )  # 0xea: (a & b) | c


@triton.constexpr_function
def _common(group, block):
    """Columns of a block that share a scale."""
    while block % group:
        block, group = group, block % group
    return group


@triton.constexpr_function
def _bits_of(value, bf16):
    """The 16 bits of a positive whole number that the type holds exactly."""
    mantissa, bias = (7, 127) if bf16 else (10, 15)
    high = value.bit_length() - 1
    return ((bias + high) << mantissa) + ((value << mantissa) >> high) - (1 << mantissa)


@triton.jit
def _whole(zero, HIGH: tl.constexpr, LOW: tl.constexpr, UPPER: tl.constexpr, D: tl.constexpr):
    """What a plane's numbers exceed its share of code - zero by, [BN, 1], negative, in D.

    The lower plane's 2^LOW counts to the upper one, but at 8 bits the sum would not be exact.
    """
    if HIGH + LOW < 8:
        more = zero.to(tl.int32) + ((1 << (HIGH + LOW)) + (1 << LOW if LOW else 0))
    elif UPPER:
        more = (zero.to(tl.int32) >> LOW << LOW) + (1 << (HIGH + LOW))
    else:
        more = (zero.to(tl.int32) & ((1 << LOW) - 1)) + (1 << LOW)
    return (-more).to(tl.float32).to(D)[:, None]


@triton.jit
def _weights(
    units, zero, FIELD: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, UPPER: tl.constexpr,
    ZERO: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One field of units int16 [BN, CHUNK] of a plane, whose planes add up to code - zero, in D.

    Without ASM in float32: Triton's interpreter knows neither PTX nor products of bfloat16.
    """
    BF16: tl.constexpr = D == tl.bfloat16  # noqa: SIM300
    BITS: tl.constexpr = HIGH if UPPER else LOW
    UP: tl.constexpr = LOW if UPPER else 0
    MAGIC: tl.constexpr = _pattern(BITS, UP, BF16)[0]
    PLACE: tl.constexpr = _pattern(BITS, UP, BF16)[1] - BITS
    # without whole zeros half of all levels stand for 0
    MIDDLE: tl.constexpr = 3 * (1 << (HIGH + LOW - 1)) + (1 << LOW if LOW else 0)
    FREE: tl.constexpr = ZERO == 1 and (UPPER or HIGH + LOW == 8)
    FIXED: tl.constexpr = 0 if FREE else _bits_of(MIDDLE, BF16) + 0x8000 if UPPER else -1
    CODE: tl.constexpr = _asm(FIELD, BITS, UP, BF16, FIXED)
    if ASM:
        if ZERO == 1:  # also where it is not used: dots of one x must agree on a layout
            less = _whole(zero, HIGH, LOW, UPPER, D)
            values = tl.inline_asm_elementwise(CODE, "=r,r,r", [units, less], tl.int16, True, 2)
        else:
            values = tl.inline_asm_elementwise(CODE, "=r,r", [units], tl.int16, True, 2)
        values = values.to(D, bitcast=True)
    else:
        MASK: tl.constexpr = (1 << BITS) - 1
        bits = ((((units.to(tl.int32) >> (FIELD * BITS)) & MASK) << PLACE) | MAGIC).to(tl.int16)
        values = bits.to(D, bitcast=True).to(tl.float32)
        if FREE:
            values += _whole(zero, HIGH, LOW, UPPER, D).to(tl.float32)
        elif UPPER:
            values -= MIDDLE
    return values


@triton.jit
def _scaled(part, total, scale, zero, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Sums [BN, BB] of (code - middle) * x, and of x [CHUNK, BB], -> sums of weight * x."""
    if ZERO == 2:
        part += ((1 << (BITS - 1)) - zero.to(tl.float32))[:, None] * tl.sum(total, 0)[None, :]
    return part * scale.to(tl.float32)[:, None]


@triton.jit
def _block(
    sums, place, x_at, high_at, low_at, scale_at, zero_at, known, columns, padded,
    HIGH: tl.constexpr, LOW: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, EVEN: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add block `place` of all columns to sums = (acc, total, scale, zero), which are returned.

    acc [BN, BB] is scaled but where GROUP is 0, total [CHUNK, BB] sums x since the last scale.
    """
    acc, total, factor, offset = sums
    FIELDS: tl.constexpr = 16 // HIGH
    TILES: tl.constexpr = HIGH // LOW if LOW else 1  # of the upper plane in a block
    BLOCK: tl.constexpr = TILES * FIELDS * CHUNK
    SHARED: tl.constexpr = _common(GROUP, BLOCK) if GROUP else BLOCK
    low = tl.load(low_at + place * (16 * CHUNK)) if LOW else 0
    part = acc
    for c in tl.static_range(TILES * FIELDS):
        k = place * BLOCK + c * CHUNK
        if c % FIELDS == 0:
            run = tl.minimum(place * TILES + c // FIELDS, tl.cdiv(columns, FIELDS * CHUNK) - 1)
            high = tl.load(high_at + run * (16 * CHUNK))
        if GROUP and (c * CHUNK) % SHARED == 0:
            part, total = tl.zeros_like(acc), tl.zeros_like(total)
            group = tl.minimum(k, columns - 1) // GROUP * padded
            factor, offset = tl.load(scale_at + group), tl.load(zero_at + group)
        xs = tl.load(x_at + k, mask=known if EVEN else known & (k < columns), other=0.0)
        if not ASM:
            xs = xs.to(tl.float32)
        w = _weights(high, offset, c % FIELDS, HIGH, LOW, True, ZERO, D, ASM)
        part = tl.dot(w, xs, part)
        if LOW:
            part = tl.dot(_weights(low, offset, c, HIGH, LOW, False, ZERO, D, ASM), xs, part)
        if ZERO == 2:
            total += xs.to(tl.float32)
        if GROUP and (c * CHUNK + CHUNK) % SHARED == 0:
            acc += _scaled(part, total, factor, offset, HIGH + LOW, ZERO)
    return (acc if GROUP else part), total, factor, offset


@triton.jit(do_not_specialize=["rows", "per"])
def multiply(
    x, codes, scale, zero, bias, y, lower, rows, out, columns, padded, per,
    HIGH: tl.constexpr, LOW: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr,
    BB: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [splits, rows, out] = partial sums of x [rows, columns] @ weight.T, `per` blocks each.

    codes from `lower` on are the lower plane; ZERO 0 none, 1 whole, 2 real; GROUP 0: a
    whole row; EVEN: all blocks are full.
    """
    D: tl.constexpr = x.dtype.element_ty
    RUN: tl.constexpr = 16 // HIGH * CHUNK
    BLOCK: tl.constexpr = 16 // LOW * CHUNK if LOW else RUN
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(2) * BB + tl.arange(0, BB)
    u = tl.arange(0, CHUNK)
    row, blocks = tl.minimum(n, padded - 1), tl.cdiv(columns, BLOCK)
    place = (row % 16 * CHUNK)[:, None] + u[None, :]
    high_at = codes + (row // 16 * (tl.cdiv(columns, RUN) * 16 * CHUNK))[:, None] + place
    low_at = codes + lower + (row // 16 * (blocks * 16 * CHUNK))[:, None] + place
    x_at = x + (b * columns)[None, :] + u[:, None]
    known = (b < rows)[None, :]
    acc, total = tl.zeros([BN, BB], tl.float32), tl.zeros([CHUNK, BB], tl.float32)
    factor, offset = tl.load(scale + row), tl.load(zero + row)
    first = tl.program_id(1) * per
    for block in range(first, tl.minimum(first + per, blocks)):
        acc, total, factor, offset = _block(
            (acc, total, factor, offset), block, x_at, high_at, low_at, scale + row, zero + row,
            known, columns, padded, HIGH, LOW, CHUNK, GROUP, ZERO, EVEN, D, ASM,
        )  # fmt: skip
    if GROUP == 0:
        acc = _scaled(acc, total, factor, offset, HIGH + LOW, ZERO)
    if BIAS:
        acc += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[:, None]
    at_y = (tl.program_id(1) * rows + b)[None, :] * out + n[:, None]
    tl.store(y + at_y, acc.to(y.dtype.element_ty), mask=known & (n < out)[:, None])


@triton.jit(do_not_specialize=["size", "splits"])
def add_up(parts, bias, y, size, out, splits, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """y [size] = parts [splits, size] summed in their order, + bias."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    acc = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        acc += tl.load(parts + split * size + i, mask=i < size, other=0.0)
    if BIAS:
        acc += tl.load(bias + i % out, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, acc.to(y.dtype.element_ty), mask=i < size)


@triton.jit
def _plain(codes, row, k, columns, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """Codes int32 [BN, CHUNK] of one plane in the columns from k on."""
    RUN: tl.constexpr = 16 // BITS * CHUNK
    start = row // 16 * (tl.cdiv(columns, RUN) * 16 * CHUNK) + k // RUN * (16 * CHUNK)
    at = (start + row % 16 * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
    return (tl.load(codes + at).to(tl.int32) >> (k % RUN // CHUNK * BITS)) & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["start", "stop"])
def expand(
    codes, scale, zero, y, lower, start, stop, columns, padded, HIGH: tl.constexpr,
    LOW: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """y [stop - start, columns] = rows start..stop-1 of the weight, rounded once."""
    k = tl.program_id(0) * CHUNK
    n = start + tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(n, padded - 1)
    values = _plain(codes, row, k, columns, HIGH, CHUNK)
    if LOW:
        values = values * (1 << LOW) + _plain(codes + lower, row, k, columns, LOW, CHUNK)
    group = k // GROUP * padded if GROUP else 0
    if ZERO:  # noqa: SIM108
        less = tl.load(zero + group + row).to(tl.float32)[:, None]
    else:
        less = 1 << (HIGH + LOW - 1)
    factor = tl.load(scale + group + row).to(tl.float32)[:, None]
    dense = ((values.to(tl.float32) - less) * factor).to(y.dtype.element_ty)
    at = ((n - start) * columns)[:, None] + (k + tl.arange(0, CHUNK))[None, :]
    tl.store(y + at, dense, mask=(n < stop)[:, None])
