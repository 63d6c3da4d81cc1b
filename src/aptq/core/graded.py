"""Graded: codes whose width differs from group to group of columns, with a whole number on average.

Of the groups of a weight as many have one bit less as have one bit more (SliM-LLM,
arXiv:2405.14917), so that every such weight takes the same bytes, however many they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from aptq.core.bits import pack, packed_size, unpack
from aptq.core.grid import Grid
from aptq.core.part import Spec, broken, check_meta, check_tensors
from aptq.core.rounding import Scales
from aptq.core.target import gradable


@dataclass(frozen=True, slots=True, eq=False)
class Graded:
    """Rows of groups, each group with its own width; whole zeros.

    codes uint8 [out, in * bits / 8], group behind group; scale [out, groups]; zero uint8, packed
    flat with bits + 1; widths uint8 [groups], which grid.bits is the mean of.  Of one-bit groups a
    code c stands for (2 c - 1) * scale, else for (c - zero) * scale.
    """

    kind: ClassVar[str] = "graded"
    codes: Tensor
    scale: Tensor
    zero: Tensor
    widths: Tensor
    grid: Grid
    shape: tuple[int, int]

    @classmethod
    def make(cls, codes: Tensor, scales: Scales, widths: Sequence[int], grid: Grid) -> "Graded":
        """Pack codes uint8 [out, in], one per byte, of groups with these widths."""
        assert scales.zero is not None
        assert sum(widths) == grid.bits * len(widths), (widths, str(grid))
        groups = codes.view(len(codes), -1, grid.group).unbind(1)
        packed = [pack(part, width) for part, width in zip(groups, widths, strict=True)]
        held = torch.tensor(widths, dtype=torch.uint8, device=codes.device)
        zero = pack(scales.zero.flatten(), grid.bits + 1)
        shape = codes.shape[0], codes.shape[1]
        return cls(torch.cat(packed, 1), scales.scale.contiguous(), zero, held, grid, shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [out, in], computed in float32 and returned in dtype."""
        return self.rows(0, self.shape[0], dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start..stop-1 of dense()."""
        group, widths = self.grid.group, self.widths.tolist()
        count = self.shape[0] * len(widths)
        zeros = unpack(self.zero, self.grid.bits + 1, count).view(self.shape[0], -1)[start:stop]
        found = torch.empty(stop - start, self.shape[1], dtype=dtype, device=self.codes.device)
        at = 0
        for number, width in enumerate(widths):
            size = group * width // 8
            codes = unpack(self.codes[start:stop, at : at + size], width, group).float()
            at += size
            scale = self.scale[start:stop, number, None].float()
            level = 2 * codes - 1 if width == 1 else codes - zeros[:, number, None].float()
            found[:, number * group : (number + 1) * group] = level * scale
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        found = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
        return found | {"widths": self.widths}

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
        if not gradable(grid) or shape[1] % grid.group:
            broken(f"grid {grid} for {shape[1]} columns", "whole groups of eights with whole zeros")
        check_tensors(tensors, graded_specs(grid, shape))
        codes, scale, zero = tensors["codes"], tensors["scale"], tensors["zero"]
        part = cls(codes, scale, zero, tensors["widths"], grid, shape)
        if not part.widths.is_meta:
            widths = part.widths.tolist()
            near = all(abs(width - grid.bits) <= 1 for width in widths)
            if not near or sum(widths) != grid.bits * len(widths):
                broken(f"widths {sorted(set(widths))}", f"{grid.bits} on average, one off at most")
        return part


def width_grid(grid: Grid, width: int) -> Grid:
    """The grid of one group [out, group] of a width of at least 2."""
    return replace(grid, element=f"int{width}", group=0)


def graded_specs(grid: Grid, shape: tuple[int, int]) -> dict[str, Spec]:
    """dtype and shape of each tensor that is stored for a weight [out, in]."""
    rows, columns = shape
    groups = columns // grid.group
    return {
        "codes": (torch.uint8, (rows, columns * grid.bits // 8)),
        "scale": (grid.scale_dtype, (rows, groups)),
        "zero": (torch.uint8, (packed_size(rows * groups, grid.bits + 1),)),
        "widths": (torch.uint8, (groups,)),
    }
