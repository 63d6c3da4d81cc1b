"""The kernel for integer codes on a CUDA device: packed products for few rows, else decoding."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.parts import Part, Quantized
from aptq.kernels.reference import DEVICE_TILE, Kernel
from aptq.kernels.triton.layout import PLANES, Layout, layout_of, repack

DTYPES = (torch.bfloat16, torch.float16)
GROWTH = 1.2  # storage may grow so at most: 3 bits of 576 columns do, of 4096 nothing grows
ROWS = 256  # from how many rows on decoding the weight once and a dense product are taken: a guess


class Fused(Kernel):
    """Codes of 2, 3, 4, 5, 6 or 8 bits in the order of layout.py, multiplied as they are.

    Sums of products of whole numbers are float32 and scaled afterwards, so the weights that are
    multiplied are exact; only y is rounded.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, part: Quantized) -> None:
        super().__init__(part.shape)
        self.layout = layout_of(part.grid, part.shape)
        for name, tensor in repack(part, self.layout)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

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
            return launch.multiply(x, *storage, bias, list(self.layout))
        (out, columns), pieces = self.shape, []
        step = max(1, DEVICE_TILE // columns)
        for start in range(0, out, step):
            stop = min(start + step, out)
            weight = launch.expand(x.detach(), *storage, list(self.layout), start, stop)
            pieces.append(F.linear(x, weight, None if bias is None else bias[start:stop]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def held(part: Quantized) -> Layout | None:
    """The layout of a part that the kernels can hold, in memory that hardly grows."""
    grid, (out, columns) = part.grid, part.shape
    group = grid.group if grid.group < columns else 0
    if grid.special or grid.bits not in PLANES or columns % 32 or group % 32 or not out:
        return None
    layout = layout_of(grid, part.shape)
    return layout if layout.nbytes <= GROWTH * part.nbytes else None


@cache
def _usable(device: torch.device) -> bool:
    """Is Triton there, and has the GPU matrix units for bfloat16?"""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
