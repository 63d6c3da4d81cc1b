"""Quantized: codes on a grid in their stored form; Dense: a weight as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from aptq.core.bits import pack, packed_size, unpack
from aptq.core.grid import Grid
from aptq.core.kbytes import step_bytes, steps_packed, steps_unpacked
from aptq.core.kquants import SUPER, recovered
from aptq.core.part import Part, Spec, broken, check_meta, check_tensors
from aptq.core.rounding import Scales, decode, encode, fit, snap


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Integer codes on a Grid, in their stored (packed) form.

    codes uint8 [out, ceil(in * bits / 8)]; scale [out, groups] in grid.scale_dtype;
    zero None | uint8, the zeros of the whole matrix packed flat | scale_dtype [out, groups].
    Of super-blocks scale is uint8 [out, n * step_bytes], their steps (kbytes), and zero None.
    """

    kind: ClassVar[str] = "quantized"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    shape: tuple[int, int]

    @classmethod
    def make(cls, codes: Tensor, scales: Scales, grid: Grid) -> "Quantized":
        """Pack codes uint8 [out, in] (one per byte) and their scales."""
        zero = scales.zero
        if grid.kind is not None:
            low = torch.zeros_like(scales.scale) if zero is None else zero * scales.scale
            steps = recovered(scales.scale, low, grid.kind)
            stored = steps_packed(steps, grid.kind)
            return cls(pack(codes, grid.bits), stored, None, grid, (len(codes), codes.shape[1]))
        if zero is not None:
            zero = pack(zero.flatten(), grid.bits) if grid.zero == "int" else zero.contiguous()
        rows, columns = codes.shape
        scale = scales.scale.contiguous()
        return cls(pack(codes, grid.bits), scale, zero, grid, (rows, columns))

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start..stop-1 of dense(), [stop - start, in], without decoding the others."""
        codes = unpack(self.codes[start:stop], self.grid.bits, self.shape[1])
        return decode(codes, self.scales(start, stop), self.grid, dtype=dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [out, in], computed in float32 and returned in dtype."""
        return self.rows(0, self.shape[0], dtype)

    def unpacked(self) -> Tensor:
        """Codes uint8 [out, in], one per byte."""
        return unpack(self.codes, self.grid.bits, self.shape[1])

    def scales(self, start: int = 0, stop: int | None = None) -> Scales:
        """Scales of rows start..stop-1 (to the end if None), zeros unpacked."""
        stop = self.shape[0] if stop is None else stop
        scale, zero = self.scale[start:stop], self.zero
        if self.grid.kind is not None:
            scale, low = steps_unpacked(scale, self.grid.kind).effective(self.grid.kind)
            return Scales(scale, low / scale if self.grid.kind.minimum else None)
        if zero is not None and self.grid.zero == "int":
            groups, bits = self.scale.shape[1], self.grid.bits
            skip = start * groups % 8  # eight codes start at a byte, whatever their bits
            first, last = start * groups - skip, stop * groups
            packed = zero[first * bits // 8 : packed_size(last, bits)]
            zero = unpack(packed, bits, last - first)[skip:].view(stop - start, groups)
        elif zero is not None:
            zero = zero[start:stop]
        return Scales(scale, zero)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: "codes", "scale" and, if the grid has one, "zero"."""
        stored = {"codes": self.codes, "scale": self.scale}
        return stored if self.zero is None else {**stored, "zero": self.zero}

    def meta(self) -> dict[str, str]:
        """What is needed besides the tensors to load the part."""
        return {"type": self.kind, "grid": str(self.grid)}

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, object], shape: tuple[int, int]
    ) -> Self:
        """The inverse of tensors() and meta().  Raises ValueError on anything unexpected."""
        check_meta(meta, {"type": cls.kind}, ("grid",))
        grid = Grid.parse(str(meta["grid"]))
        if grid.dense:
            broken(f"grid {grid}", "integer grid")
        check_tensors(tensors, grid_specs(grid, shape))
        return cls(tensors["codes"], tensors["scale"], tensors.get("zero"), grid, shape)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A weight [out, in] stored as it is, in a floating dtype."""

    kind: ClassVar[str] = "dense"
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight."""
        return self.weight.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] in dtype."""
        return self.weight.to(dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start..stop-1 of dense()."""
        return self.weight[start:stop].to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: "weight"."""
        return {"weight": self.weight}

    def meta(self) -> dict[str, str]:
        """What is needed besides the tensors to load the part."""
        return {"type": self.kind}

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, object], shape: tuple[int, int]
    ) -> Self:
        """The inverse of tensors() and meta().  Raises ValueError on anything unexpected."""
        check_meta(meta, {"type": cls.kind}, ())
        weight = tensors.get("weight")
        dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
        check_tensors(tensors, {"weight": (dtype, shape)})
        return cls(tensors["weight"])


def grid_specs(grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
    """dtype and shape of each tensor that a part on this grid stores for a weight [out, in]."""
    rows, columns = shape
    if grid.dense:
        return {"weight": (torch.bfloat16, shape)}
    if grid.kind is not None:
        size = columns // SUPER * step_bytes(grid.kind)
        codes = (rows, packed_size(columns, grid.bits))
        return {"codes": (torch.uint8, codes), "scale": (torch.uint8, (rows, size))}
    groups = grid.groups(columns)
    specs: dict[str, Spec] = {
        "codes": (torch.uint8, (rows, packed_size(columns, grid.bits))),
        "scale": (grid.scale_dtype, (rows, groups)),
    }
    if grid.zero == "int":
        specs["zero"] = (torch.uint8, (packed_size(rows * groups, grid.bits),))
    elif grid.zero == "float":
        specs["zero"] = (grid.scale_dtype, (rows, groups))
    return specs


def part_of(rounded: Tensor, scales: Scales, grid: Grid) -> Part:
    """The part that stores rounded [out, in], whose values lie on the grid with these scales."""
    if grid.dense:
        return Dense(rounded.to(torch.bfloat16))
    return Quantized.make(encode(rounded, scales, grid), scales, grid)


def nearest_part(weight: Tensor, grid: Grid, *, shrink: Sequence[float] = (1.0,)) -> Part:
    """The part of weight [out, in] rounded to nearest; ranges as `fit` takes them."""
    scales = fit(weight, grid, shrink=shrink)
    return part_of(snap(weight, scales, grid), scales, grid)
