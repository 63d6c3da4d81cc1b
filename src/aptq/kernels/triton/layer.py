"""The kernel for integer codes on a CUDA device: packed products for few rows, else decoding."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.parts import Part, Quantized
from aptq.kernels.addends import Factors
from aptq.kernels.reference import DEVICE_TILE, Kernel
from aptq.kernels.triton.layout import BITS, Layout, codes_of, layout_of, repack

DTYPES = (torch.bfloat16, torch.float16)
GROWTH = 1.2  # storage may grow so at most: 3 bits of 576 columns do, of 4096 nothing grows
ROWS = 192  # from so many rows on decoding the weight once and a dense product are faster


class Fused(Kernel):
    """Codes of 2 to 8 bits in the order of layout.py, multiplied as they are.

    Sums of products of whole numbers are float32 and scaled afterwards, so the weights that are
    multiplied are exact; only y is rounded.
    """

    codes: Tensor
    counts: Tensor  # so a layer may not run in two streams at once
    scale: Tensor
    zero: Tensor | None
    left: Tensor | None  # [rank, out], [rank, in]: factors that are added in the same launch
    right: Tensor | None
    edges: list[int] | None = None  # of layers that were joined, as launch.multiply has them

    def __init__(self, part: Quantized) -> None:
        super().__init__(part.shape)
        self.layout = layout_of(part.grid, part.shape)
        for name, tensor in repack(part, self.layout)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        for name in ("left", "right"):
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Integer grids whose groups are multiples of 32, on a GPU with bfloat16 units."""
        return (
            isinstance(part, Quantized)
            and device.type == "cuda"
            and dtype in DTYPES
            and held(part) is not None
            and _usable(device)
        )

    @classmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> Kernel:
        """Repack the codes where they lie."""
        assert isinstance(part, Quantized), type(part)
        return cls(part)

    def absorb(self, other: Kernel) -> bool:
        """Take over factors, whose second product then costs no launch of its own."""
        ranks = (16, 32, 64, 128)  # what the matrix units take at once
        if self.left is not None or not isinstance(other, Factors) or len(other.left) not in ranks:
            return False
        self.left, self.right = other.left, other.right
        return True

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x bfloat16 or float16 [rows, in] -> [rows, out]."""
        from aptq.kernels.triton import launch

        storage = (self.codes, self.scale, self.zero)
        if x.dtype not in DTYPES or x.device != self.codes.device:
            raise ValueError(
                "a packed layer was prepared for another dtype or device\n"
                f"activations are {x.dtype} on {x.device}, weights for bfloat16 or float16 on "
                f"{self.codes.device}\nload the checkpoint again with the dtype and device that "
                "you want"
            )
        if x.shape[0] < ROWS and not (x.requires_grad and torch.is_grad_enabled()):
            first = (self.codes, self.counts, self.scale, self.zero, bias)
            return launch.multiply(x, *first, list(self.layout), self.left, self.right, self.edges)
        (out, columns), pieces = self.shape, []
        step = max(1, DEVICE_TILE // columns)
        for start in range(0, out, step):
            stop = min(start + step, out)
            weight = launch.expand(x.detach(), *storage, list(self.layout), start, stop)
            pieces.append(F.linear(x, weight, None if bias is None else bias[start:stop]))
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        if self.left is None or self.right is None:
            return y
        return torch.addmm(y, F.linear(x, self.right), self.left)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [n] int64 (any order, repeated too) of the weight: float32 [n, in]."""
        how, columns = self.layout, self.shape[1]
        values = codes_of(self.codes, how, ids)[:, :columns]
        scale, zero = self.scale[:, ids].T.float(), 1 << (how.bits - 1)
        less = torch.full_like(scale, zero) if self.zero is None else self.zero[:, ids].T.float()
        each = how.group or columns
        wide = [t.repeat_interleave(each, 1)[:, :columns] for t in (scale, less)]
        return (values.float() - wide[1]) * wide[0]


def held(part: Quantized) -> Layout | None:
    """The layout of a part that the kernels can hold, in memory that hardly grows."""
    grid, (out, columns) = part.grid, part.shape
    group = grid.group if grid.group < columns else 0
    if grid.special or grid.bits not in BITS or columns % 32 or group % 32 or not out:
        return None
    layout = layout_of(grid, part.shape)
    return layout if layout.nbytes <= GROWTH * part.nbytes else None


@cache
def _usable(device: torch.device) -> bool:
    """Is Triton there, and has the GPU matrix units for bfloat16?"""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
