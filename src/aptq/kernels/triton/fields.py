"""Codes in bit planes of 16-bit units -> numbers, in registers or as a decoded weight.

A unit with its field moved into the mantissa and a fixed exponent is a number 2^bits + code, so two
weights (neighbouring units of a register) cost a shift and a logical operation for each plane.  It
is exact: all values are whole and at most 256 (8 bits: in two numbers).
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _format(bf16):
    """(bits of the mantissa, bias of the exponent) of bfloat16 or float16."""
    return (7, 127) if bf16 else (10, 15)


@triton.constexpr_function
def asm(field, high, other, low, up, bf16, less):
    """PTX for two units of the upper ($1) and, with low bits, the lower plane ($2) -> two numbers.

    They are 2^(high + low + up) + their codes << up, less the bits of a constant in both halves'
    type, what the last operand holds at 0, or nothing at -1.
    """
    mantissa, bias = _format(bf16)
    magic = ((bias + high + low + up) << mantissa) * 0x10001
    code = f".reg .b32 t, u, m, o, z; mov.b32 m, {magic:#x};"
    for source, at, bits, below in (("$1", field, high, 0), ("$2", other, low, high)):
        if bits:
            place = mantissa - below - bits
            shift = at * bits - place
            code += f"{'shr' if shift > 0 else 'shl'}.b32 u, {source}, {abs(shift)};"
            mask = (((1 << bits) - 1) << place) * 0x10001
            code += f" lop3.b32 t, u, {mask:#x}, {'t' if below else 'm'}, 0xea;"  # (a & b) | c
    if less < 0:
        return f"{{ {code} mov.b32 $0, t; }}"
    code += f"mov.b32 z, {f'{less * 0x10001:#x}' if less else '$3' if low else '$2'};"
    add = "mov.b32 o, 0x3f803f80; fma.rn.bf16x2 $0, t, o, z;" if bf16 else "add.f16x2 $0, t, z;"
    return f"{{ {code} {add} }}"


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
    upper, lower, zero, FIELD: tl.constexpr, HIGH: tl.constexpr, OTHER: tl.constexpr,
    LOW: tl.constexpr, UP: tl.constexpr, LESS: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Fields of units int16 [BN, CHUNK] -> their codes << UP, each with 2^(all bits) added, in D.

    LESS is taken off: a whole number, at 0 that sum and zero [BN, 1] (negative), at -1 nothing.
    Without ASM in float32: Triton's interpreter knows neither PTX nor products of bfloat16.
    """
    BF16: tl.constexpr = D == tl.bfloat16  # noqa: SIM300
    FIXED: tl.constexpr = negative(LESS, BF16) if LESS > 0 else LESS
    CODE: tl.constexpr = asm(FIELD, HIGH, OTHER, LOW, UP, BF16, FIXED)
    if ASM:
        # operands that the code does not name would still take registers
        if LOW and LESS == 0:
            values = tl.inline_asm_elementwise(
                CODE, "=r,r,r,r", [upper, lower, zero], tl.int16, True, 2
            )
        elif LOW:
            values = tl.inline_asm_elementwise(CODE, "=r,r,r", [upper, lower], tl.int16, True, 2)
        elif LESS == 0:
            values = tl.inline_asm_elementwise(CODE, "=r,r,r", [upper, zero], tl.int16, True, 2)
        else:
            values = tl.inline_asm_elementwise(CODE, "=r,r", [upper], tl.int16, True, 2)
        values = values.to(D, bitcast=True)
    else:
        codes = (upper.to(tl.int32) >> (FIELD * HIGH)) & ((1 << HIGH) - 1)
        if LOW:
            more = (lower.to(tl.int32) >> (OTHER * LOW)) & ((1 << LOW) - 1)
            codes = (codes << LOW) | more
        values = ((1 << (HIGH + LOW + UP)) + (codes << UP)).to(tl.float32)
        if LESS == 0:
            values += zero.to(tl.float32)
        elif LESS > 0:
            values -= LESS
    return values


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
