"""Parts: a compressed weight is a sum of these."""

from collections.abc import Callable

import torch
from torch import Tensor

from aptq.core.graded import Graded, graded_specs
from aptq.core.lowrank import LowRank, factor_specs
from aptq.core.part import Part, Spec
from aptq.core.quantized import Dense, Quantized, grid_specs, nearest_part, part_of
from aptq.core.sparse import Sparse, outlier_specs
from aptq.core.target import PartSpec

__all__ = [
    "PARTS",
    "Dense",
    "Graded",
    "LowRank",
    "Part",
    "Quantized",
    "Sparse",
    "Spec",
    "empty_part",
    "load_part",
    "nearest_part",
    "part_of",
    "part_specs",
]

PARTS: dict[str, type[Part]] = {
    "quantized": Quantized,
    "dense": Dense,
    "graded": Graded,
    "lowrank": LowRank,
    "sparse": Sparse,
}


def part_specs(spec: PartSpec, shape: tuple[int, int]) -> dict[str, Spec]:
    """dtype and shape of each tensor that a part stores for a weight [out, in]."""
    if spec.kind == "lowrank":
        return factor_specs(spec, shape)
    if spec.kind == "sparse":
        return outlier_specs(spec, shape)
    assert spec.grid is not None, spec
    if spec.graded:
        return graded_specs(spec.grid, shape)
    return grid_specs(spec.grid, shape)


def load_part(spec: PartSpec, shape: tuple[int, int], read: Callable[[str], Tensor]) -> Part:
    """The part of a weight [out, in] whose tensors `read` gives by name.  Raises ValueError."""
    meta: dict[str, str] = {"type": spec.kind}
    if spec.kind == "lowrank":
        meta |= {"rank": str(spec.rank), "grid": str(spec.grid or "bf16")}
    elif spec.kind == "sparse":
        meta["outliers"] = str(spec.outliers)
    elif spec.kind in ("quantized", "graded"):
        meta["grid"] = str(spec.grid)
    tensors = {name: read(name) for name in part_specs(spec, shape)}
    return PARTS[spec.kind].load(tensors, meta, shape)


def empty_part(spec: PartSpec, shape: tuple[int, int]) -> Part:
    """The part of a weight [out, in] without values, on meta."""
    specs = part_specs(spec, shape)

    def read(name: str) -> Tensor:
        dtype, size = specs[name]
        return torch.empty(size, dtype=dtype, device="meta")

    return load_part(spec, shape, read)
