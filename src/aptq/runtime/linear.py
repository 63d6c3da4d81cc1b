"""PackedLinear: a linear layer whose weight is a sum of parts and stays packed in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aptq.core.parts import Part, empty_part
from aptq.core.plan import Target
from aptq.kernels.dispatch import Choice, prepare
from aptq.kernels.reference import Kernel, Reference


class Packed(nn.Module):
    """Holds a weight as the sum of `parts`; what is computed with it, subclasses say.

    Its tensors are called as in a checkpoint, "parts.0.codes", until prepare() lets kernels
    replace them.
    """

    parts: nn.ModuleList

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        assert parts, "a packed layer without parts"
        self.parts = nn.ModuleList(Reference(part) for part in parts)

    def prepare(self, dtype: torch.dtype, choice: Choice = "auto") -> None:
        """Replace the stored tensors by what the best kernel for activations of `dtype` wants."""
        for index, stored in enumerate(self.parts):
            assert isinstance(stored, Reference), f"prepared already: {type(stored).__name__}"
            self.parts[index] = prepare(stored.part, dtype, choice)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight; only with the reference kernel, which keeps what is stored."""
        kernels = [kernel for kernel in self.parts if isinstance(kernel, Reference)]
        assert len(kernels) == len(self.parts), "other kernels keep rearranged storage"
        weights = [kernel.part.dense() for kernel in kernels]
        return sum(weights[1:], start=weights[0]).to(dtype)


class PackedLinear(Packed):
    """y = sum of x @ part.T over the parts, + bias.  x [..., in] -> [..., out]."""

    bias: nn.Parameter | None
    adapted = False  # is the last part an adapter for a task?

    def __init__(self, parts: Sequence[Part], bias: Tensor | None = None) -> None:
        super().__init__(parts)
        self.out_features, self.in_features = parts[0].shape
        fixed = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", fixed)

    @classmethod
    def empty(cls, target: Target, shape: tuple[int, int], bias: Tensor | None) -> "PackedLinear":
        """Without values, on meta: what a checkpoint is loaded into."""
        return cls(empty_parts(target, shape), bias)

    def prepare(self, dtype: torch.dtype, choice: Choice = "auto") -> None:
        """As of all packed modules; parts that the first kernel can add on the way go into it."""
        super().prepare(dtype, choice)
        first, *others = self.parts
        assert isinstance(first, Kernel), type(first)
        self.parts = nn.ModuleList([first, *(k for k in others if not first.absorb(k))])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x."""
        rows, y = x.reshape(-1, self.in_features).contiguous(), None
        # not by iteration over the list, through __call__ or by names that modules look up last:
        # their microseconds count where a token takes hundreds of products
        bias = self._parameters["bias"]
        for kernel in self.parts._modules.values():
            assert isinstance(kernel, Kernel)
            y = kernel.begin(x, rows, bias) if y is None else y + kernel.forward(rows)
        assert y is not None
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def empty_parts(target: Target, shape: tuple[int, int]) -> list[Part]:
    """The parts of a planned weight [out, in] without values, on meta."""
    return [empty_part(spec, shape) for spec in target.parts]
