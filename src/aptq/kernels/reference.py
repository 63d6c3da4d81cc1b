"""Kernels that keep a part's own storage: the exact one, and one that decodes tile by tile."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aptq.core.parts import PARTS, Graded, Part, Quantized

# Weights decoded at once.  CPU, measured on int4 from 576 x 576 to 4096 x 4096: 2^20 is fastest,
# smaller tiles pay per call, 2^24 leaves the caches and takes 8 times as long.  GPU: 64 MiB.
CACHE_TILE, DEVICE_TILE = 1 << 20, 1 << 24


class Kernel(nn.Module, ABC):
    """Computes y = x @ part.dense().T + bias from storage of its own, which replaces the part's.

    x [rows, in] contiguous, bias [out] or None -> [rows, out] in the dtype of x.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape  # (out, in)

    @classmethod
    @abstractmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Can this kernel run `part` for activations of `dtype` on `device`?"""

    @classmethod
    @abstractmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> "Kernel":
        """A kernel for `part`; holds about part.nbytes and no reference to the part."""

    @abstractmethod
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out]."""

    def begin(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """As forward(rows, bias) in the first place of a layer; x [..., in] is the layer's input.

        `rows` are made of x anew for every layer: only x tells that layers have the same input.
        """
        return self.forward(rows, bias)

    def absorb(self, other: "Kernel") -> bool:
        """From now on add what `other` computes, if one call can do both; is it taken over?"""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(dtype) means activations and norms: codes and scales are what the file says.
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        applied: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return applied


class Reference(Kernel):
    """Exact: one linear layer with the decoded weight in the dtype of x.

    Its buffers are the part's tensors under their stored names, so a model built of it on meta
    is what a checkpoint is loaded into.
    """

    def __init__(self, part: Part) -> None:
        super().__init__(part.shape)
        self.meta = part.meta()
        self.names = tuple(part.tensors())
        for name, tensor in part.tensors().items():
            self.register_buffer(name, tensor)

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Everything."""
        return True

    @classmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> Kernel:
        """Takes the part's tensors as they are."""
        return cls(part)

    @property
    def part(self) -> Part:
        """The part, around the tensors that are loaded now.  Raises ValueError if they misfit."""
        tensors = {name: self.get_buffer(name) for name in self.names}
        return PARTS[self.meta["type"]].load(tensors, self.meta, self.shape)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        return F.linear(x, self.part.dense(x.dtype), bias)


class Tiled(Reference):
    """Decodes a few rows of the weight at a time; any grid, device and dtype.

    The decoded weight is the reference's; only the order of sums may differ.
    """

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Whatever has to be decoded."""
        return isinstance(part, Quantized | Graded)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        part, (out, columns) = self.part, self.shape
        step = max(1, (CACHE_TILE if x.device.type == "cpu" else DEVICE_TILE) // columns)
        if step >= out:
            return super().forward(x, bias)
        # one output that the tiles fill: half the memory of joining them
        y = x.new_empty(len(x), out)
        for start in range(0, out, step):
            stop = min(start + step, out)
            rows = part.rows(start, stop, x.dtype)
            y[:, start:stop] = F.linear(x, rows, None if bias is None else bias[start:stop])
        return y
