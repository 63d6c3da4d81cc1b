"""ATen's packed CPU kernels for decoding, with a decode-and-multiply path for many rows.

Only for bfloat16 activations: the float32 and float16 variants are scalar loops (25 times slower
than a dense layer, measured in float32).
"""

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.parts import Part, Quantized
from aptq.kernels.reference import CACHE_TILE, Kernel

# From how many rows on decoding the weight once and a bfloat16 GEMM win (measured on 1 and 2
# cores with AVX512_BF16; both sides grow with out * in, so the shape does not matter).
INT4_ROWS, INT8_ROWS = 128, 32
GROUPS = (256, 128, 64, 32)  # all that _weight_int4pack_mm_for_cpu takes
GROWTH = 1.12  # storage may grow by this at most: scale and zero both become bfloat16


class Layout(NamedTuple):
    """How this CPU's int4 packing orders the rows of a weight; it differs by instruction set."""

    block: int  # rows that are stored together, column after column
    halves: bool  # byte i of a full block holds rows i and i + block/2; else rows 2i and 2i + 1

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Bytes of whole blocks, or of one shorter last block -> codes uint8 [in, rows]."""
        flat = packed.flatten()
        rows = 2 * flat.numel() // columns
        width = min(self.block, rows)
        tiles = flat.view(-1, columns, width // 2).transpose(0, 1)
        dim = -2 if self.halves and width == self.block else -1
        return torch.stack([tiles & 15, tiles >> 4], dim).reshape(columns, rows)


@cache
def layout() -> Layout | None:
    """The layout, found by packing known codes; None if it is no known one."""
    codes = (torch.arange(112)[:, None] * 5 + torch.arange(32) * 3) % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for guess in (Layout(block, halves) for block in (64, 32, 16) for halves in (True, False)):
        whole = 112 // guess.block * guess.block
        pieces = [guess.unpack(packed[:whole], 32)]
        if whole < 112:
            pieces.append(guess.unpack(packed[whole:], 32))
        if torch.equal(torch.cat(pieces, 1), codes.T.to(torch.uint8)):
            return guess
    return None


class Int4(Kernel):
    """4-bit codes through _weight_int4pack_mm_for_cpu: w = (code - 8) * scale + shift.

    packed uint8 [out, in/2] in ATen's order; affine bfloat16 [in/group, out, 2] = (scale, shift).
    Scales lose bits when they become bfloat16; shift is computed from the rounded scale, so that
    most shifts (zeros 8 +- a power of two) are exact and a zero weight stays zero.
    """

    packed: Tensor
    affine: Tensor

    def __init__(self, packed: Tensor, affine: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("affine", affine, persistent=False)

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """4 bits, bfloat16, out a multiple of 16, groups that ATen has or that split into such."""
        return (
            isinstance(part, Quantized)
            and part.grid.bits == 4
            and part.grid.table is None
            and device.type == "cpu"
            and dtype == torch.bfloat16
            and part.shape[0] % 16 == 0
            and _group(part) > 0
            and layout() is not None
        )

    @classmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> Kernel:
        """Repack codes and scales."""
        assert isinstance(part, Quantized), type(part)
        (out, columns), group = part.shape, _group(part)
        packed = torch.empty(out, columns // 2, dtype=torch.uint8)
        codes = part.unpacked()
        for start in range(0, out, 64):  # a multiple of every block; keeps the int32 codes small
            rows = slice(start, start + 64)
            packed[rows] = torch._convert_weight_to_int4pack_for_cpu(codes[rows].int(), 1)
        scale, zero = part.scales()
        scale = scale.to(torch.bfloat16).float()
        shift = torch.zeros_like(scale) if zero is None else (8 - zero.float()) * scale
        natural = part.grid.group_of(columns)[::group]
        affine = torch.stack([scale, shift], -1)[:, natural].transpose(0, 1)
        return cls(packed, affine.to(torch.bfloat16).contiguous(), part.shape)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x bfloat16 [rows, in] -> [rows, out]."""
        _check(x)
        if x.shape[0] >= INT4_ROWS or (x.requires_grad and torch.is_grad_enabled()):
            y = self._multiply(x)
        else:  # names that modules look up last take microseconds
            packed, affine = self._buffers["packed"], self._buffers["affine"]
            assert packed is not None
            assert affine is not None
            group = self.shape[1] // affine.shape[0]
            y = torch._weight_int4pack_mm_for_cpu(x, packed, group, affine)
        return y if bias is None else y + bias

    def _multiply(self, x: Tensor) -> Tensor:
        """The same by decoding [in, some rows] at a time."""
        order, (out, columns) = layout(), self.shape
        assert order is not None
        groups, block = self.affine.shape[0], order.block
        whole = out // block * block
        step = max(1, CACHE_TILE // columns // block) * block
        cuts = [*range(0, whole, step), whole] + ([out] if whole < out else [])
        outputs = []
        for start, stop in pairwise(cuts):
            codes = order.unpack(self.packed[start:stop], columns)
            scale, shift = self.affine[:, None, start:stop].float().unbind(-1)
            values = codes.view(groups, -1, stop - start).float()
            values = torch.addcmul(shift - 8 * scale, values, scale)  # (code - 8) * scale + shift
            outputs.append(x @ values.view(columns, stop - start).to(x.dtype))
        return torch.cat(outputs, 1)


def _group(part: Quantized) -> int:
    """The largest group of ATen's that every group of the part splits into; 0 if there is none."""
    (out, columns), size = part.shape, part.grid.group or part.shape[1]
    for group in GROUPS:
        if columns % group == 0 and (size % group == 0 or size >= columns):
            nbytes = out * (columns // 2 + 4 * columns // group)
            return group if nbytes <= GROWTH * part.nbytes else 0
    return 0


class Int8(Kernel):
    """Symmetric 8-bit codes through _weight_int8pack_mm, once a group: w = (code - 128) * scale.

    codes int8 [groups, out, group]; scale [groups, out] as stored.  The kernel gets scales of 1 and
    its outputs are scaled in float32, so that stored scales stay exact.  Not for grids with zeros:
    they would be subtracted from outputs that are already rounded to bfloat16, which was off by up
    to 30 % where inputs have a mean (ReLU) and weights heavy tails.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """8 bits, no zeros, bfloat16, equal groups of a multiple of 16.

        ATen checks neither: with other widths it reads past the end of a row.
        """
        if not isinstance(part, Quantized) or part.grid.bits != 8 or part.grid.zero != "none":
            return False
        size = min(part.grid.group or part.shape[1], part.shape[1])
        whole = part.shape[1] % size == 0 and size % 16 == 0
        return whole and device.type == "cpu" and dtype == torch.bfloat16

    @classmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> Kernel:
        """Reorder codes and scales group by group."""
        assert isinstance(part, Quantized), type(part)
        out, groups = part.scale.shape
        codes = (part.unpacked() ^ 128).view(torch.int8).view(out, groups, -1)
        return cls(codes.transpose(0, 1).contiguous(), part.scale.T.clone(), part.shape)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x bfloat16 [rows, in] -> [rows, out]."""
        _check(x)
        if x.shape[0] >= INT8_ROWS or (x.requires_grad and torch.is_grad_enabled()):
            return self._multiply(x, bias)
        groups, out, size = self.codes.shape
        # A copy even of one group: ATen loads activations as if they were 32-byte aligned.
        split = torch.empty(groups, x.shape[0], size, dtype=x.dtype)
        split.copy_(x.view(-1, groups, size).transpose(0, 1))
        ones = torch.ones(out, dtype=x.dtype)
        sums = [torch._weight_int8pack_mm(split[i], self.codes[i], ones) for i in range(groups)]
        y = (torch.stack(sums).float() * self.scale.float()[:, None]).sum(0)
        return (y if bias is None else y + bias).to(x.dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same by decoding [some rows, in] at a time."""
        out, columns = self.shape
        step = max(1, CACHE_TILE // columns)
        outputs = []
        for start in range(0, out, step):
            rows = slice(start, start + step)
            values = self.codes[:, rows].transpose(0, 1).contiguous().float()
            values.mul_(self.scale[:, rows].T.float()[:, :, None])
            weight = values.view(-1, columns).to(x.dtype)
            outputs.append(F.linear(x, weight, None if bias is None else bias[rows]))
        return torch.cat(outputs, 1)


def _check(x: Tensor) -> None:
    if x.dtype != torch.bfloat16 or not x.is_cpu:
        raise ValueError(
            f"a packed layer was prepared for another dtype or device\n"
            f"activations are {x.dtype} on {x.device}, weights for torch.bfloat16 on cpu\n"
            "load the checkpoint again with the dtype and device that you want"
        )
