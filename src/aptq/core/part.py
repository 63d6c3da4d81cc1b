"""Part: one summand of a compressed weight.  Parts know their tensors, never a method."""

from collections.abc import Mapping
from typing import NoReturn, Protocol, Self

import torch
from torch import Tensor

Spec = tuple[torch.dtype, tuple[int, ...]]


class Part(Protocol):
    """One summand of a weight [out, in]."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor: ...
    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def meta(self) -> dict[str, str]: ...
    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], meta: Mapping[str, object], shape: tuple[int, int]
    ) -> Self: ...


def check_meta(meta: Mapping[str, object], fixed: dict[str, str], free: tuple[str, ...]) -> None:
    """Raise ValueError unless meta has the texts `fixed` and any text under the keys `free`."""
    expected = {**fixed, **{key: meta.get(key) for key in free}}
    if dict(meta) != expected or any(not isinstance(meta.get(key), str) for key in free):
        broken(f"description {dict(meta)}", f"keys {sorted(expected)} with values {fixed}")


def check_tensors(tensors: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> None:
    """Raise ValueError unless tensors have exactly these names, dtypes and shapes."""
    if tensors.keys() != specs.keys():
        broken(f"tensors {sorted(tensors)}", f"{sorted(specs)}")
    for name, (dtype, shape) in specs.items():
        found = tensors[name]
        if found.dtype != dtype or tuple(found.shape) != tuple(shape):
            broken(f"{name} {found.dtype} {list(found.shape)}", f"{name} {dtype} {list(shape)}")


def broken(found: str, expected: str) -> NoReturn:
    """Raise ValueError."""
    raise ValueError(f"found {found}, expected {expected}")
