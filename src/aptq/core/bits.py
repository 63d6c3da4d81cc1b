"""Pack and unpack codes of 1..8 bits: a little-endian bit stream along the last dimension.

Eight codes of b bits fill exactly b bytes.  Such an octet is moved as one 64-bit word, in three
steps that halve (or double) the gaps between neighbours, so the work is the same for all b.
"""

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take, the last byte filled up with zero bits."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n], each < 2^bits -> uint8 [..., ceil(n * bits / 8)].

    Code i takes bits i*bits .. (i+1)*bits-1 of the stream; bit k is bit k % 8 of byte k // 8.
    A code that does not fit loses its upper bits.
    """
    assert 1 <= bits <= 8, bits
    assert codes.dtype == torch.uint8, codes.dtype
    lead, count = codes.shape[:-1], codes.shape[-1]
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    if codes.numel() == 0:
        return codes.new_empty(*lead, packed_size(count, bits))
    octets = -(-count // 8)
    lanes = codes.new_zeros(*lead, octets * 8)
    lanes[..., :count] = codes
    word = lanes.view(torch.int64)
    for lane, width in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        low = _mask(width, 2 * lane)
        word = (word & low) | ((word >> (lane - width)) & (low << width))
    stream = word.view(torch.uint8).view(*lead, octets, 8)[..., :bits]
    return stream.reshape(*lead, octets * bits)[..., : packed_size(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """uint8 [..., ceil(n * bits / 8)] -> uint8 codes [..., n]: the inverse of pack."""
    assert 1 <= bits <= 8, bits
    assert packed.dtype == torch.uint8, packed.dtype
    lead, size = packed.shape[:-1], packed.shape[-1]
    assert size == packed_size(n, bits), (packed.shape, bits, n)
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    if packed.numel() == 0:
        return packed.new_empty(*lead, n)
    if bits == 4:  # the most used width: a byte becomes two without the detour over words
        pair = packed.to(torch.int16)
        return ((pair | (pair << 4)) & 0x0F0F).view(torch.uint8)[..., :n].contiguous()
    octets = -(-n // 8)
    stream = packed
    if size != octets * bits:
        stream = packed.new_zeros(*lead, octets * bits)
        stream[..., :size] = packed
    lanes = packed.new_zeros(*lead, octets, 8)
    lanes[..., :bits] = stream.reshape(*lead, octets, bits)
    word = lanes.view(torch.int64)
    for lane, width in ((32, 4 * bits), (16, 2 * bits), (8, bits)):
        low = _mask(width, 2 * lane)
        word = (word & low) | ((word & (low << width)) << (lane - width))
    return word.view(torch.uint8).view(*lead, octets * 8)[..., :n].contiguous()


def _mask(width: int, lane: int) -> int:
    """A 64-bit word with the lowest `width` bits of each `lane` bits set."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, lane))
