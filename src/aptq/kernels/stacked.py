"""Several layers that read the same input as one product, which costs one launch.

A layer keeps its place and its bias; its kernel becomes a Share, which takes its columns out of
the product that the first of them to see an input has made for all.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from aptq.core.parts import Part
from aptq.kernels.reference import Kernel
from aptq.kernels.triton.layer import Fused


class Stacked(nn.Module):
    """The joined kernel of some layers, and what of its last product has not been fetched yet.

    Every piece is handed out once, and only for the very tensor that the product was made of with
    the contents that it had.  That tensor is kept meanwhile, so that no other can take its place.
    """

    def __init__(self, kernels: Sequence[Fused], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.kernel = Fused.join(kernels)
        self.sizes = [kernel.shape[0] for kernel in kernels]
        self.starts = [0, *accumulate(self.sizes)]
        self.biases = list(biases)  # in a list, so that the layers' own are not registered twice
        self.drop()

    def drop(self) -> None:
        """Forget the last product."""
        self.x: Tensor | None = None
        self.version: int | None = None
        self.pieces: list[Tensor | None] = []

    def __getstate__(self) -> dict[str, Any]:
        # copies and files hold weights, no activations
        return self.__dict__ | {"x": None, "version": None, "pieces": []}

    def take(self, index: int, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """The columns of layer `index`, whose bias is `bias` now, of rows [few, in] made of x."""
        if self.biases[index] is not bias:
            self.biases[index] = bias
            self.drop()
        version = None
        # a tracer tells tensors apart but knows no versions: traced code may not change x between
        if not torch.compiler.is_compiling():
            if x.is_inference():  # counts no versions: what is kept might be of older contents
                return self._pieces(rows)[index]
            version = x._version
        if self.x is not x or self.version != version or self.pieces[index] is None:
            self.pieces = [*self._pieces(rows)]
            self.x, self.version = x, version
        found, self.pieces[index] = self.pieces[index], None
        if all(piece is None for piece in self.pieces):
            self.drop()
        assert found is not None
        return found

    def _pieces(self, rows: Tensor) -> Sequence[Tensor]:
        bias = None
        if any(bias is not None for bias in self.biases):
            bias = torch.cat(
                [
                    rows.new_zeros(size) if own is None else own
                    for own, size in zip(self.biases, self.sizes, strict=True)
                ]
            )
        return torch.split(self.kernel.forward(rows, bias), self.sizes, 1)


class Share(Kernel):
    """The kernel of one of the stacked layers.

    The stack is a module of every share: each moves and copies with it, and torch counts it once.
    """

    def __init__(self, stack: Stacked, index: int) -> None:
        super().__init__((stack.sizes[index], stack.kernel.shape[1]))
        self.stack, self.index = stack, index

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Nothing: shares are made of kernels."""
        return False

    @classmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> Kernel:
        """Never asked for."""
        raise AssertionError(f"a share made of {part}")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out], from this layer's rows of the weight alone."""
        first = self.stack.starts[self.index]
        return self.stack.kernel.decoded(x, bias, first, first + self.shape[0])

    def begin(self, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Few rows: columns of the common product.  Many: a product of its own costs no more."""
        if not self.stack.kernel.few(rows):
            return self.forward(rows, bias)
        y = self.stack.take(self.index, x, rows, bias)
        # columns of one position lie as those of a product of their own, for all that models do
        # with them; of several they do not
        return y if len(rows) == 1 or x.shape[-2] == 1 else y.contiguous()
