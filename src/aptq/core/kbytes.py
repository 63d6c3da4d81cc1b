"""Bytes of super-blocks: as GGUF lays them out, and the steps as our checkpoints store them.

Layouts are those of ggml (tested against the package gguf).
"""

import torch
from torch import Tensor

from aptq.core.bits import pack, unpack
from aptq.core.kquants import SUPER, KQuant, Steps


def packed(codes: Tensor, steps: Steps, kind: KQuant) -> Tensor:
    """The bytes of a GGUF tensor, uint8 [out, n * nbytes], of codes uint8 [out, in]."""
    out, n = steps.above.shape
    u = codes.view(out, n, SUPER).int()
    d = _bytes(steps.above)
    a = steps.scales.view(out, n, -1).int()
    b = a if steps.minima is None else steps.minima.view(out, n, -1).int()
    e = d if steps.below is None else _bytes(steps.below)
    pieces = {
        "q2_k": lambda: [a | b << 4, _quarters(u), d, e],
        "q3_k": lambda: [_planes(u >> 2), _quarters(u & 3), _sixteen(a + 32), d],
        "iq4_xs": lambda: [d, *_eight(a + 32), _halves(u, 16)],
        "q4_k": lambda: [d, e, _pairs(a, b), _halves(u, 32)],
        "q5_k": lambda: [d, e, _pairs(a, b), _planes(u >> 4), _halves(u & 15, 32)],
        "q6_k": lambda: [_halves(u & 15, 64), _quarters(u >> 4), a & 255, d],
    }[kind.name]()
    return torch.cat([piece.to(torch.uint8) for piece in pieces], -1).view(out, -1)


def step_bytes(kind: KQuant) -> int:
    """Bytes of the steps of a super-block: all that its codes do not take."""
    return kind.nbytes - SUPER // 8 * kind.bits


def steps_packed(steps: Steps, kind: KQuant) -> Tensor:
    """Steps as they are stored, uint8 [out, n * step_bytes]."""
    out, n = steps.above.shape
    width = (kind.high - kind.low).bit_length()
    pieces = [_bytes(steps.above), pack(_lanes(steps.scales, n, kind.low), width)]
    if steps.minima is not None and steps.below is not None:
        pieces += [_bytes(steps.below), pack(_lanes(steps.minima, n, 0), width)]
    return torch.cat(pieces, -1).view(out, -1)


def steps_unpacked(stored: Tensor, kind: KQuant) -> Steps:
    """The inverse of steps_packed."""
    out, inside, width = len(stored), SUPER // kind.group, (kind.high - kind.low).bit_length()
    rows = stored.view(out, -1, step_bytes(kind))
    size = inside * width // 8

    def half(at: int) -> Tensor:
        return rows[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)

    def whole(at: int, low: int) -> Tensor:
        lanes = unpack(rows[..., at : at + size].contiguous(), width, inside)
        return (lanes.to(torch.int16) + low).flatten(1)

    if not kind.minimum:
        return Steps(whole(2, kind.low), None, half(0), None)
    return Steps(whole(2, kind.low), whole(4 + size, 0), half(0), half(2 + size))


def _lanes(numbers: Tensor, n: int, low: int) -> Tensor:
    return (numbers - low).to(torch.uint8).view(len(numbers), n, -1)


def _bytes(value: Tensor) -> Tensor:
    return value.half().contiguous().view(torch.uint8).view(*value.shape, 2)


def _shifted(parts: Tensor, width: int) -> Tensor:
    """[..., k, l] -> [..., l]: part k at bit k * width."""
    shifts = torch.arange(parts.shape[-2], device=parts.device) * width
    return (parts << shifts[:, None]).sum(-2)


def _quarters(u: Tensor) -> Tensor:
    """Two bits of 256 codes: element 32 j + l of each 128 in bits 2 j of byte l."""
    return _shifted(u.view(*u.shape[:-1], 2, 4, 32), 2).flatten(-2)


def _planes(u: Tensor) -> Tensor:
    """One bit of 256 codes: element 32 k + l in bit k of byte l."""
    return _shifted(u.view(*u.shape[:-1], 8, 32), 1)


def _halves(u: Tensor, width: int) -> Tensor:
    """Nibbles: of each 2 * width codes the first half low, the second high."""
    return _shifted(u.view(*u.shape[:-1], -1, 2, width), 4).flatten(-2)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """Twelve bytes of eight pairs of six bits."""
    first, last = (a[..., :4], b[..., :4]), (a[..., 4:], b[..., 4:])
    lows = [one | (other >> 4) << 6 for one, other in zip(first, last, strict=True)]
    return torch.cat([*lows, last[0] & 15 | (last[1] & 15) << 4], -1)


def _sixteen(a: Tensor) -> Tensor:
    """Twelve bytes of sixteen times six bits."""
    nibbles = a[..., :8] & 15 | (a[..., 8:] & 15) << 4
    return torch.cat([nibbles, _shifted((a >> 4).view(*a.shape[:-1], 4, 4), 2)], -1)


def _eight(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eight times six bits: two bytes of upper bits, four of nibbles."""
    upper = ((a >> 4) << 2 * torch.arange(8, device=a.device)).sum(-1)
    pair = (a & 15).view(*a.shape[:-1], 4, 2)
    return torch.stack([upper & 255, upper >> 8], -1), pair[..., 0] | pair[..., 1] << 4
