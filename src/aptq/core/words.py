"""Codes in 32-bit words: the same little-endian bit stream as in bits.py, as other formats cut it.

Element i of a row takes bits i*b .. (i+1)*b-1 of the stream; codes may straddle two words.
"""

import torch
from torch import Tensor

from aptq.core.bits import pack, unpack


def words(count: int, bits: int) -> int:
    """32-bit words that `count` codes take."""
    return -(-count * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] -> int32 [..., ceil(n * bits / 32)], the last word filled with zeros."""
    size = 4 * words(codes.shape[-1], bits)
    packed = pack(codes, bits)
    filled = packed.new_zeros(*packed.shape[:-1], size)
    filled[..., : packed.shape[-1]] = packed
    return filled.view(torch.int32)


def unpack_words(packed: Tensor, bits: int, n: int) -> Tensor:
    """int32 [..., ceil(n * bits / 32)] -> uint8 codes [..., n]: the inverse of pack_words."""
    assert packed.shape[-1] == words(n, bits), (packed.shape, bits, n)
    # Flat first: of a single column, contiguous() keeps strides that no view as bytes can have.
    stream = packed.flatten().view(torch.uint8).view(*packed.shape[:-1], 4 * packed.shape[-1])
    return unpack(stream[..., : -(-n * bits // 8)].contiguous(), bits, n)
