"""Kernels of what is added to codes: two factors one after the other, and single weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.parts import LowRank, Part, Sparse
from aptq.kernels.reference import Kernel, Tiled

# inputs that are gathered, as a share of the places, from which on decoding tiles is faster: on two
# CPU cores 16 rows at 0.5 % and 4 rows at 2 %, of three shapes; not measured on a GPU
FEW = 0.08


class Factors(Kernel):
    """y = (x @ right.T) @ left: rank * (in + out) products a row instead of in * out.

    Factors on a grid are decoded once: they are a few percent of the codes beside them.
    """

    left: Tensor  # [rank, out] in the dtype of the activations
    right: Tensor  # [rank, in]

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__((left.shape[1], right.shape[1]))
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Factors, everywhere."""
        return isinstance(part, LowRank)

    @classmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> Factors:
        """Decode the factors."""
        assert isinstance(part, LowRank)
        return cls(*part.factors(dtype))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        inner = F.linear(x, self.right)
        return inner @ self.left if bias is None else torch.addmm(bias, inner, self.left)


class Gathered(Tiled):
    """Few inputs: they are gathered and summed in float32; many: tiles are decoded."""

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Single weights, everywhere."""
        return isinstance(part, Sparse)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        values = self.get_buffer("values")
        if len(x) * len(values) > FEW * self.shape[0] * self.shape[1]:
            return super().forward(x, bias)
        columns, starts = self.get_buffer("columns").int(), self.get_buffer("starts").long()
        terms = x.T[columns].float() * values.float()[:, None]
        y = torch.segment_reduce(terms, "sum", offsets=starts, axis=0, initial=0.0)
        y = y.T.to(x.dtype)
        return y if bias is None else y + bias
