"""Profiles: how much an error of a layer's output matters, by the position of its token.

The squared output gradient falls by orders of magnitude over the first tokens of a window and is
then nearly flat, so positions are binned by powers of two: [0], [1], [2, 3], [4..7], ...
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Profiles(NamedTuple):
    """Profiles of many layers, measured on windows of one length."""

    window: int  # tokens of a window they were measured on
    of: Mapping[str, Tensor]  # full layer name -> [bins] mean squared output gradient of a token
    # full layer name -> uint8 [out, ceil(in / 8)], a bit at each place of an outlier
    marks: Mapping[str, Tensor] = MappingProxyType({})


def bin_of(length: int) -> Tensor:
    """Bin of every position of a window, int64 [length]: the number of bits of the position."""
    edges = 2 ** torch.arange(max(length - 1, 0).bit_length())
    return torch.bucketize(torch.arange(length), edges, right=True)


def row_weights(profile: Tensor, measured: int, length: int) -> Tensor:
    """Weight of a row by its position in a window of `length` tokens, float32 [length], mean 1.

    `profile` [bins] comes from windows of `measured` tokens; longer windows repeat its last bin.
    The first token's error reaches every later one, so its bin grows with the window.  Where no
    position of the window has a gradient all rows weigh 1.
    """
    values = profile.detach().double().cpu().clone()
    values[0] *= length / measured
    weights = values[bin_of(length).clamp(max=len(values) - 1)]
    mean = weights.mean()
    if not mean > 0:
        return torch.ones(length)
    return (weights / mean).float()
