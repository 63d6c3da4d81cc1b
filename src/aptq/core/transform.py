"""Equivalent transformations: what makes y gives (y - shift) A^-1, and what reads it takes A in.

A factor is a vector of scales [width] (A is diagonal) or a stack of matrices [heads, d, d] (A is
block diagonal); vectors are rows, so a linear reads y W^T + b (arXiv:2308.13137, arXiv:2403.12544).
"""

import torch
from torch import Tensor

LEAST = 1e-2  # scales and diagonals never get closer to 0 (OmniQuant's code)


def divided(rows: Tensor, factor: Tensor) -> Tensor:
    """A weight [out, in] or bias [out] that makes y A^-1 instead of y; factor covers `out`."""
    if factor.dim() == 1:
        return rows / factor.view(-1, *[1] * (rows.dim() - 1))
    blocks = rows.view(len(factor), factor.shape[1], -1)
    # without its check, which would wait for the device; dominant matrices can be inverted
    solved, _ = torch.linalg.solve_ex(factor.mT, blocks)
    found: Tensor = solved.reshape(rows.shape)
    return found


def multiplied(weight: Tensor, factor: Tensor) -> Tensor:
    """The weight W A^T [out, in] that reads y A^-1 as `weight` reads y; factor covers `in`."""
    if factor.dim() == 1:
        return weight * factor
    blocks = weight.view(len(weight), len(factor), -1).transpose(0, 1)
    return (blocks @ factor.mT).transpose(0, 1).flatten(1)


def shared(factor: Tensor, heads: int, times: int) -> Tensor:
    """A factor of `heads` KV heads for the query heads, `times` of which read each of them."""
    if factor.dim() == 1:
        return factor.view(heads, 1, -1).expand(-1, times, -1).flatten()
    return factor.unsqueeze(1).expand(-1, times, -1, -1).flatten(0, 1)


def first_scale(reach: Tensor, largest: Tensor, power: float) -> Tensor:
    """s = max|x|^power / max|w|^(1 - power) of each channel, [width], with geometric mean 1.

    A common factor of all scales changes nothing but what the rates of their descent mean.
    """
    reach, largest = reach.float().clamp(min=1e-5), largest.float().clamp(min=1e-5)
    scale = reach.pow(power) / largest.pow(1 - power)
    return (scale / scale.log().mean().exp()).clamp(LEAST, 1 / LEAST)


def bounded(scale: Tensor) -> Tensor:
    """Scales at least LEAST away from 0, with their sign."""
    return scale.abs().clamp(min=LEAST).copysign(scale)
