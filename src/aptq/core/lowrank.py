"""LowRank: a product of two factors, each in 16 bits or on a grid of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.part import Part, Spec, check_meta, check_tensors
from aptq.core.quantized import Dense, Quantized, grid_specs, nearest_part
from aptq.core.target import PartSpec

SIDES = ("left", "right")


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The weight left.T @ right [out, in]; both factors are stored with a row for each rank.

    left [rank, out], right [rank, in]: Dense, or Quantized on one grid along their rows.
    """

    kind: ClassVar[str] = "lowrank"
    left: Part
    right: Part

    @classmethod
    def make(cls, left: Tensor, right: Tensor, spec: PartSpec) -> "LowRank":
        """Store factors left [out, rank] and right [rank, in] as `spec` says."""
        grid = spec.grid or Grid("bf16")
        return cls(nearest_part(left.T.contiguous(), grid), nearest_part(right, grid))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return self.left.nbytes + self.right.nbytes

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(left [rank, out], right [rank, in])."""
        return self.left.dense(dtype), self.right.dense(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The product [out, in], computed in float32 and returned in dtype."""
        return self.rows(0, self.shape[0], dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start..stop-1 of dense()."""
        left, right = self.factors()
        return (left[:, start:stop].T @ right).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: the tensors of "left" and "right", such as "left_weight"."""
        sides = zip(SIDES, (self.left, self.right), strict=True)
        return {
            f"{side}_{n}": tensor for side, part in sides for n, tensor in part.tensors().items()
        }

    def meta(self) -> dict[str, str]:
        """What is needed besides the tensors to load the part."""
        grid = self.left.grid if isinstance(self.left, Quantized) else Grid("bf16")
        return {"type": self.kind, "rank": str(self.left.shape[0]), "grid": str(grid)}

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, object], shape: tuple[int, int]
    ) -> Self:
        """The inverse of tensors() and meta().  Raises ValueError on anything unexpected."""
        check_meta(meta, {"type": cls.kind}, ("rank", "grid"))
        grid, rank = Grid.parse(str(meta["grid"])), int(str(meta["rank"]))
        spec = PartSpec(None if grid.dense else grid, rank=rank)
        check_tensors(tensors, factor_specs(spec, shape))
        kind: type[Part] = Dense if grid.dense else Quantized
        inner = {"type": "dense"} if grid.dense else {"type": "quantized", "grid": str(grid)}
        left, right = (
            kind.load(
                {n.removeprefix(f"{side}_"): t for n, t in tensors.items() if n.startswith(side)},
                inner,
                (rank, length),
            )
            for side, length in zip(SIDES, shape, strict=True)
        )
        return cls(left, right)


def factor_specs(spec: PartSpec, shape: tuple[int, int]) -> dict[str, Spec]:
    """dtype and shape of the tensors of factors for a weight [out, in]."""
    grid = spec.grid or Grid("bf16")
    return {
        f"{side}_{name}": found
        for side, length in zip(SIDES, shape, strict=True)
        for name, found in grid_specs(grid, (spec.rank, length)).items()
    }
