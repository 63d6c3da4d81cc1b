"""Which kernel runs a part: the first of KERNELS that supports it."""

from typing import Literal

import torch
from torch import Tensor

from aptq.core.parts import Part
from aptq.kernels.addends import Factors, Gathered
from aptq.kernels.cpu import Int4, Int8
from aptq.kernels.cpu_lanes import Lanes
from aptq.kernels.reference import Kernel, Reference, Tiled
from aptq.kernels.triton.layer import Fused

Choice = Literal["auto", "reference"]
# Int4 before Lanes, which holds scales exactly: a token takes 0.8 times as long (docs/log.md)
KERNELS: tuple[type[Kernel], ...] = (Int4, Lanes, Int8, Factors, Gathered, Fused, Tiled, Reference)


def prepare(part: Part, dtype: torch.dtype, choice: Choice = "auto") -> Kernel:
    """The kernel for `part` where it lies and for activations of `dtype`, ready to run.

    "reference" keeps the stored tensors and decodes the whole weight in every call.
    """
    if choice == "reference":
        return Reference.prepare(part, dtype)
    device = next(iter(part.tensors().values())).device
    kernel = next(kernel for kernel in KERNELS if kernel.supports(part, device, dtype))
    return kernel.prepare(part, dtype)


def matmul(x: Tensor, part: Part, choice: Choice = "auto") -> Tensor:
    """x [..., in] @ part.dense().T -> [..., out]; prepares the part anew, so for single calls."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = prepare(part, x.dtype, choice)(rows)
    return y.view(*x.shape[:-1], part.shape[0])
