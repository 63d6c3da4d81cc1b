"""Codes in 16-bit units -> numbers, in registers or as a decoded weight.

A unit with a field in the mantissa and a fixed exponent is a number offset + code, so two weights
(neighbouring units of a register) cost a logical operation, and a shift that they share with the
other fields that it brings into the mantissa.  It is exact: all values are whole and at most 256
(8 bits: in two numbers).
"""

import triton
import triton.language as tl

WINDOW = 7  # bits of the mantissa that fields are brought to: all of bfloat16's


@triton.constexpr_function
def units_of(bits):
    """As layout.units_of: what Triton compiles may not call plain functions."""
    return bits // (bits & -bits)


@triton.constexpr_function
def block_codes(bits):
    """As layout.block_codes."""
    return 16 * units_of(bits) // bits


@triton.constexpr_function
def pieces(bits, code, half):
    """Where code number `code` of a block is: (unit, its lowest bit there, bits, bits below).

    The first codes are fields of one unit, the last lie in the bits that these leave free.  half 1
    and 2: the lower and the upper 4 bits of 8.
    """
    fields, free = 16 // bits, 16 % bits
    if half:
        return [(code // 2, code % 2 * 8 + (half - 1) * 4, 4, 0)]
    if code < units_of(bits) * fields:
        return [(code // fields, code % fields * bits, bits, 0)]
    found, first = [], (code - units_of(bits) * fields) * bits
    for unit in range(units_of(bits)):
        low, high = max(first, unit * free), min(first + bits, unit * free + free)
        if low < high:
            found.append((unit, 16 - free + low - unit * free, high - low, low - first))
    return found


@triton.constexpr_function
def sources(bits, code):
    """(first unit, number of units) that a code is spread over."""
    found = pieces(bits, code, 0)
    return found[0][0], len(found)


@triton.constexpr_function
def place(bits, code, half, spread):
    """The lowest bit of the code in the window; spread: where few shifts bring it, else on top."""
    found = pieces(bits, code, half)
    width = 4 if half else bits
    if len(found) > 1 or not spread:
        return WINDOW - width
    field, first, many = found[0][1] // width, WINDOW // width, WINDOW // width
    if field < first:
        return field * width
    start = first + (field - first) // many * many
    return WINDOW - min(many, 16 // width - start) * width + (field - start) * width


@triton.constexpr_function
def offset(bits, code, half, spread):
    """What the number of a code has too much."""
    return 1 << WINDOW - place(bits, code, half, spread) + (4 if half == 2 else 0)


@triton.constexpr_function
def _format(bf16):
    """(bits of the mantissa, bias of the exponent) of bfloat16 or float16."""
    return (7, 127) if bf16 else (10, 15)


@triton.constexpr_function
def asm(bits, code, half, spread, bf16, less):
    """PTX for two numbers of the units $1, $2, .. that hold a code.

    They are offset + code (its upper half: << 4), less the bits of a constant in both halves' type,
    what the last operand holds at 0, or nothing at -1.
    """
    mantissa, bias = _format(bf16)
    found, up = pieces(bits, code, half), 4 if half == 2 else 0
    lowest = place(bits, code, half, spread)
    exponent = bias + WINDOW - lowest + up
    made = f".reg .b32 t, u, m, o, z; mov.b32 m, {(exponent << mantissa) * 0x10001:#x};"
    for index in range(len(found)):
        _, start, width, below = found[index]
        target = mantissa - WINDOW + lowest + below
        source, shift = f"${index + 1}", start - target
        if shift:
            made += f"{'shr' if shift > 0 else 'shl'}.b32 u, {source}, {abs(shift)};"
            source = "u"
        mask = (((1 << width) - 1) << target) * 0x10001
        made += f" lop3.b32 t, {source}, {mask:#x}, {'t' if index else 'm'}, 0xea;"  # (a & b) | c
    if less < 0:
        return f"{{ {made} mov.b32 $0, t; }}"
    made += f"mov.b32 z, {f'{less * 0x10001:#x}' if less else f'${len(found) + 1}'};"
    add = "mov.b32 o, 0x3f803f80; fma.rn.bf16x2 $0, t, o, z;" if bf16 else "add.f16x2 $0, t, z;"
    return f"{{ {made} {add} }}"


@triton.constexpr_function
def constraints(operands):
    """Of so many operands."""
    return "=r" + ",r" * operands


@triton.constexpr_function
def common(group, block):
    """Columns of a block that share a scale."""
    while block % group:
        block, group = group, block % group
    return group


@triton.constexpr_function
def negative(value, bf16):
    """The 16 bits of minus a positive whole number that the type holds exactly."""
    mantissa, bias = _format(bf16)
    high = value.bit_length() - 1
    return 0x8000 + ((bias + high) << mantissa) + ((value << mantissa) >> high) - (1 << mantissa)


@triton.jit
def numbers(
    units, zero, BITS: tl.constexpr, CODE: tl.constexpr, HALF: tl.constexpr, SPREAD: tl.constexpr,
    LESS: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Units int16 [BN, CHUNK] of a block -> offset + code number CODE of it, in D.

    HALF 1 and 2: of 8 bits the lower, and the upper 4 bits where they are.  LESS is taken off: a
    whole number, at 0 zero [BN, 1] (negative), at -1 nothing.  Without ASM in float32: Triton's
    interpreter knows neither PTX nor products of bfloat16.
    """
    BF16: tl.constexpr = D == tl.bfloat16  # noqa: SIM300
    FIXED: tl.constexpr = negative(LESS, BF16) if LESS > 0 else LESS
    FIRST: tl.constexpr = sources(BITS, CODE)[0]
    COUNT: tl.constexpr = sources(BITS, CODE)[1]
    if ASM:
        # operands that the code does not name would still take registers
        given = ()
        for unit in tl.static_range(COUNT):
            given = given + (units[FIRST + unit],)  # noqa: RUF005
        if LESS == 0:
            given = given + (zero,)  # noqa: RUF005
        values = tl.inline_asm_elementwise(
            asm(BITS, CODE, HALF, SPREAD, BF16, FIXED), constraints(COUNT + (LESS == 0)), given,
            tl.int16, True, 2,
        ).to(D, bitcast=True)  # fmt: skip
    else:
        codes = _whole(units, BITS, CODE)
        if HALF == 1:
            codes = codes & 15
        elif HALF == 2:
            codes = codes >> 4 << 4
        values = (codes + offset(BITS, CODE, HALF, SPREAD)).to(tl.float32)
        if LESS == 0:
            values += zero.to(tl.float32)
        elif LESS > 0:
            values -= LESS
    return values


@triton.jit
def _whole(units, BITS: tl.constexpr, CODE: tl.constexpr):
    """Code number CODE of a block, int32."""
    FREE: tl.constexpr = 16 % BITS
    FIELDS: tl.constexpr = 16 // BITS
    UNITS: tl.constexpr = units_of(BITS)
    if CODE < UNITS * FIELDS:
        codes = units[CODE // FIELDS].to(tl.int32) >> (CODE % FIELDS * BITS)
    else:
        codes = tl.zeros_like(units[0].to(tl.int32))
        for unit in tl.static_range(UNITS):
            spare = (units[unit].to(tl.int32) >> (16 - FREE)) & ((1 << FREE) - 1)
            codes |= spare << (unit * FREE)
        codes = codes >> ((CODE - UNITS * FIELDS) * BITS)
    return codes & ((1 << BITS) - 1)


@triton.jit
def _plain(
    codes, row, number, runs, BITS: tl.constexpr, CHUNK: tl.constexpr, UNITS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Codes int32 [BN, CHUNK] of chunk `number` of these rows."""
    FREE: tl.constexpr = 16 % BITS
    FIELDS: tl.constexpr = 16 // BITS
    at = codes + (row // 16 * (runs * 16 * CHUNK) + row % 16 * CHUNK)[:, None]
    at += tl.arange(0, CHUNK)[None, :]
    first, code = number // COUNT * UNITS, number % COUNT
    found = tl.zeros([row.shape[0], CHUNK], tl.int32)
    if code < UNITS * FIELDS:
        unit = tl.load(at + (first + code // FIELDS) * (16 * CHUNK)).to(tl.int32)
        found = unit >> (code % FIELDS * BITS)
    else:
        for unit in tl.static_range(UNITS):
            spare = tl.load(at + (first + unit) * (16 * CHUNK)).to(tl.int32) >> (16 - FREE)
            found |= (spare & ((1 << FREE) - 1)) << (unit * FREE)
        found = found >> ((code - UNITS * FIELDS) * BITS)
    return found & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["start", "stop"])
def expand(
    codes, scale, zero, y, runs, start, stop, columns, padded, BITS: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [stop - start, columns] = rows start..stop-1 of the weight, rounded once."""
    k = tl.program_id(0) * CHUNK
    n = start + tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(n, padded - 1)
    values = _plain(
        codes, row, tl.program_id(0), runs, BITS, CHUNK, units_of(BITS), block_codes(BITS)
    )
    group = k // GROUP * padded if GROUP else 0
    if ZERO:  # noqa: SIM108
        less = tl.load(zero + group + row).to(tl.float32)[:, None]
    else:
        less = 1 << (BITS - 1)
    factor = tl.load(scale + group + row).to(tl.float32)[:, None]
    dense = ((values.to(tl.float32) - less) * factor).to(y.dtype.element_ty)
    at = ((n - start) * columns)[:, None] + (k + tl.arange(0, CHUNK))[None, :]
    tl.store(y + at, dense, mask=(n < stop)[:, None])
