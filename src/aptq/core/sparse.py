"""Sparse: single weights in 16 bits with their places, the rest zeros."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from aptq.core.part import Spec, broken, check_meta, check_tensors
from aptq.core.target import NARROW, PartSpec


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Compressed sparse rows: row r holds values[starts[r]:starts[r + 1]] at these columns.

    values bfloat16 [n]; columns [n], uint16 (int32 from 65,537 columns on); starts int32 [out + 1].
    """

    kind: ClassVar[str] = "sparse"
    values: Tensor
    columns: Tensor
    starts: Tensor
    shape: tuple[int, int]
    outliers: int  # so many of target.SHARE weights

    @classmethod
    def make(cls, weight: Tensor, mask: Tensor, spec: PartSpec) -> "Sparse":
        """Store weight [out, in] where mask bool [out, in] is set: at spec.count(shape) places."""
        rows, columns = weight.shape
        row, column = mask.nonzero(as_tuple=True)
        assert len(row) == spec.count((rows, columns)), (len(row), str(spec), weight.shape)
        starts = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
        starts[1:] = mask.sum(1).cumsum(0)
        values = weight[row, column].to(torch.bfloat16)
        return cls(values, column.to(place(columns)), starts, (rows, columns), spec.outliers)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def mask(self) -> Tensor:
        """Places that are held, bool [out, in]."""
        found = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        found[self._row_ids(), self.columns.long()] = True
        return found

    def _row_ids(self) -> Tensor:
        """The row of every value, LongTensor [n]."""
        counts = self.starts.diff().long()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]."""
        return self.rows(0, self.shape[0], dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows start..stop-1 of dense()."""
        starts = self.starts[start : stop + 1].long()
        first, last = int(starts[0]), int(starts[-1])
        ids = torch.arange(stop - start, device=starts.device).repeat_interleave(starts.diff())
        found = torch.zeros(stop - start, self.shape[1], dtype=dtype, device=starts.device)
        found[ids, self.columns[first:last].long()] = self.values[first:last].to(dtype)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"values": self.values, "columns": self.columns, "starts": self.starts}

    def meta(self) -> dict[str, str]:
        """What is needed besides the tensors to load the part."""
        return {"type": self.kind, "outliers": str(self.outliers)}

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, object], shape: tuple[int, int]
    ) -> Self:
        """The inverse of tensors() and meta().  Raises ValueError on anything unexpected."""
        check_meta(meta, {"type": cls.kind}, ("outliers",))
        spec = PartSpec(outliers=int(str(meta["outliers"])))
        check_tensors(tensors, outlier_specs(spec, shape))
        part = cls(tensors["values"], tensors["columns"], tensors["starts"], shape, spec.outliers)
        part._check_places()
        return part

    def _check_places(self) -> None:
        """Raise ValueError unless the starts ascend to the number of values, columns exist."""
        if self.starts.is_meta:
            return
        ends = self.starts[[0, -1]].tolist()
        if ends != [0, len(self.values)] or bool((self.starts.diff() < 0).any()):
            broken(f"rows from {ends[0]} to {ends[1]}", f"ascending from 0 to {len(self.values)}")
        if len(self.columns) and int(self.columns.int().max()) >= self.shape[1]:
            broken(f"column {int(self.columns.int().max())}", f"less than {self.shape[1]}")


def place(columns: int) -> torch.dtype:
    """The type of a column's number in rows of so many columns."""
    return torch.uint16 if columns <= NARROW else torch.int32


def outlier_specs(spec: PartSpec, shape: tuple[int, int]) -> dict[str, Spec]:
    """dtype and shape of the tensors of outliers of a weight [out, in]."""
    count = spec.count(shape)
    return {
        "values": (torch.bfloat16, (count,)),
        "columns": (place(shape[1]), (count,)),
        "starts": (torch.int32, (shape[0] + 1,)),
    }
