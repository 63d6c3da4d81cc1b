"""Differentiable rounding: a weight on a grid as a function of what gradients may change.

A latent is a weight in units of its group's scale, without the zero; its level is the nearest whole
number that the grid has, and the stored code is level + zero (see rounding.level_of).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.rounding import Scales, code_offset

# A latent starts this near to its code's border at most (in steps), so that rounding gives the code
# back whatever float32 does, yet it can cross with a small move where the weight lies beyond
LEAN = 0.45


class _Through(torch.autograd.Function):
    """round() with the gradient of the identity (straight-through, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def round_ste(x: Tensor) -> Tensor:
    """Nearest whole numbers; gradients pass unchanged."""
    rounded: Tensor = _Through.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Clamped values; gradients pass unchanged, also from outside (arXiv:2407.11062, its code)."""
    return _valued(x, x.clamp(low, high))


def cast_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as `dtype` stores them, in float32; gradients pass unchanged."""
    return _valued(x, x.to(dtype).to(x.dtype))


def _valued(x: Tensor, value: Tensor) -> Tensor:
    """`value` with the gradient of x; x + (value - x) would not be value in floating point."""
    return value.detach() + (x - x.detach())


def spread(values: Tensor, columns: int, grid: Grid) -> Tensor:
    """[out, columns] from [out, groups]: each column gets what its group has."""
    size = grid.group or columns
    wide = values.unsqueeze(-1).expand(*values.shape, size).flatten(1)
    return wide[:, :columns]


def extremes(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(least, largest) of every group, [out, groups], with 0 inside the range; weight [out, in]."""
    columns = weight.shape[1]
    size = grid.group or columns
    padded = F.pad(weight, (0, -columns % size)).view(len(weight), -1, size)
    return padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)


def level(latent: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Differentiable `rounding.level_of`: latent [out, in], zero [out, in] float32 or None.

    Clamped latents pass no gradient to themselves but one to the zero.
    """
    if zero is None:
        half = grid.levels // 2
        return round_ste(latent).clamp(-half, half - 1)
    code = round_ste(latent) + zero if grid.zero == "int" else round_ste(latent + zero)
    return code.clamp(0, grid.levels - 1) - zero


def rounded(latent: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Differentiable weight [out, in] of a latent on float32 scales and zeros [out, groups]."""
    columns = latent.shape[1]
    wide = None if scales.zero is None else spread(scales.zero, columns, grid)
    return level(latent, wide, grid) * spread(scales.scale, columns, grid)


def stored_scale(scale: Tensor, grid: Grid) -> Tensor:
    """Scales [out, groups] as they are stored, in float32; gradients pass unchanged.

    Never 0: below the smallest number of the stored dtype they keep it, with their sign.
    """
    least = 2.0**-24 if grid.scale_dtype == torch.float16 else torch.finfo(grid.scale_dtype).tiny
    safe = scale.detach().abs().clamp(least, torch.finfo(grid.scale_dtype).max)
    safe = safe.copysign(scale.detach()).to(grid.scale_dtype).float()
    return _valued(scale, safe)


def stored_zero(zero: Tensor | None, grid: Grid) -> Tensor | None:
    """Zeros [out, groups] as they are stored, in float32; gradients pass unchanged."""
    if zero is None:
        return None
    if grid.zero == "int":
        return clamp_ste(round_ste(zero), 0, grid.levels - 1)
    return cast_ste(clamp_ste(zero, 0, grid.levels - 1), grid.scale_dtype)


def opened(part: Quantized, weight: Tensor | None = None) -> tuple[Tensor, Scales]:
    """(latent [out, in], scales in float32 [out, groups]) that round to exactly this part.

    With the weight [out, in] that the part stands for, latents lean towards it by up to LEAN steps,
    so that a code whose weight was compensated away is the first to come back.
    """
    scale, zero = part.scales()
    wide = None if zero is None else spread(zero.float(), part.shape[1], part.grid)
    codes = part.unpacked().float() - code_offset(wide, part.grid)
    if weight is not None:
        exact = weight / spread(scale.float(), part.shape[1], part.grid)
        codes = codes + (exact - codes).clamp(-LEAN, LEAN)
    return codes, Scales(scale.float(), None if zero is None else zero.float())


def closed(latent: Tensor, scales: Scales, grid: Grid) -> Quantized:
    """The part whose codes are the levels of latent [out, in] on scales (float32, any value)."""
    columns = latent.shape[1]
    with torch.no_grad():
        scale, zero = stored_scale(scales.scale, grid), stored_zero(scales.zero, grid)
        wide = None if zero is None else spread(zero, columns, grid)
        codes = level(latent, wide, grid) + code_offset(wide, grid)
    if zero is not None:
        zero = zero.to(torch.uint8 if grid.zero == "int" else grid.scale_dtype)
    return Quantized.make(codes.to(torch.uint8), Scales(scale.to(grid.scale_dtype), zero), grid)
