"""The kernel for integer codes on a CUDA device: packed products for few rows, else decoding."""

import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.parts import Part, Quantized
from aptq.kernels.addends import Factors
from aptq.kernels.reference import DEVICE_TILE, Kernel
from aptq.kernels.triton.layout import BITS, Buffers, Layout, codes_of, layout_of, repack
from aptq.kernels.triton.layout import ROWS as TILE

DTYPES = (torch.bfloat16, torch.float16)
GROWTH = 1.2  # storage may grow so at most: 3 bits of 576 columns do, of 4096 nothing grows
EDGE = 128  # rows of the weight that a program takes at most
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
        layout = layout_of(part.grid, part.shape)
        self._hold(layout, repack(part, layout))

    def _hold(self, layout: Layout, buffers: Buffers) -> None:
        self.layout = layout
        for name, tensor in buffers._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        for name in ("left", "right"):
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def join(cls, kernels: Sequence["Fused"]) -> "Fused":
        """One kernel for the weights of `kernels` below each other; all have the same `kind`.

        All but the last have a multiple of `step` rows: tiles are stored one after another, and
        the rows that a program of the GPU takes have the factors of one layer.
        """
        sizes, first = [kernel.shape[0] for kernel in kernels], kernels[0]
        layout = first.layout._replace(out=sum(sizes))
        assert len(kernels) <= first.most, sizes
        assert not any(size % first.step for size in sizes[:-1]), sizes
        assert len({kernel.kind for kernel in kernels}) == 1, [kernel.kind for kernel in kernels]
        codes = torch.cat([kernel.codes for kernel in kernels])
        zeros = [kernel.zero for kernel in kernels if kernel.zero is not None]
        joined = cls.__new__(cls)
        Kernel.__init__(joined, (layout.out, layout.columns))
        counts = first.counts.new_zeros(layout.counters)
        scale = torch.cat([kernel.scale for kernel in kernels], 1)
        joined._hold(layout, Buffers(codes, counts, scale, torch.cat(zeros, 1) if zeros else None))
        pairs = [(k.left, k.right) for k in kernels if k.left is not None and k.right is not None]
        if pairs:
            joined.left = torch.cat([left for left, _ in pairs], 1)
            right = torch.cat([right for _, right in pairs])
            ranks = 1 << (len(right) - 1).bit_length()  # as many as the matrix units take
            joined.right = F.pad(right, (0, 0, 0, ranks - len(right)))
            joined.edges = [*accumulate(sizes)][:-1]
        return joined

    @property
    def step(self) -> int:
        """All but the last of joined kernels have a multiple of so many rows."""
        return TILE if self.left is None else EDGE

    @property
    def most(self) -> int:
        """How many can be joined."""
        return sys.maxsize if self.left is None else 3

    @property
    def kind(self) -> tuple[object, ...]:
        """What kernels that are joined have in common."""
        zero = None if self.zero is None else self.zero.dtype
        rank = 0 if self.left is None else len(self.left)
        return self.layout._replace(out=0), self.codes.device, self.scale.dtype, zero, rank

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

        if self.few(x):
            first = (self.codes, self.counts, self.scale, self.zero, bias)
            return launch.multiply(x, *first, list(self.layout), self.left, self.right, self.edges)
        return self.decoded(x, bias, 0, self.shape[0])

    def few(self, x: Tensor) -> bool:
        """Are the codes multiplied as they are for x [rows, in], or decoded before?

        Raises ValueError where they cannot be multiplied with x.
        """
        if x.dtype not in DTYPES or x.device != self.codes.device:
            raise ValueError(
                "a packed layer was prepared for another dtype or device\n"
                f"activations are {x.dtype} on {x.device}, weights for bfloat16 or float16 on "
                f"{self.codes.device}\nload the checkpoint again with the dtype and device that "
                "you want"
            )
        return x.shape[0] < ROWS and not (x.requires_grad and torch.is_grad_enabled())

    def decoded(self, x: Tensor, bias: Tensor | None, first: int, last: int) -> Tensor:
        """x [rows, in] -> [rows, last - first]: by decoded rows first..last-1; bias of these."""
        from aptq.kernels.triton import launch

        storage, pieces = (self.codes, self.scale, self.zero), []
        step = max(1, DEVICE_TILE // self.shape[1])
        for start in range(first, last, step):
            stop = min(start + step, last)
            weight = launch.expand(x.detach(), *storage, list(self.layout), start, stop)
            piece = None if bias is None else bias[start - first : stop - first]
            pieces.append(F.linear(x, weight, piece))
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return y if self.left is None else self._added(y, x, first, last)

    def _added(self, y: Tensor, x: Tensor, first: int, last: int) -> Tensor:
        """y [rows, last - first] with the factors of these rows of the weight."""
        assert self.left is not None
        assert self.right is not None
        rank, pieces = len(self.left), []
        for own, (start, stop) in enumerate(pairwise([0, *(self.edges or ()), self.shape[0]])):
            low, high = max(first, start), min(last, stop)
            if low < high:
                inner = F.linear(x, self.right[own * rank : own * rank + rank])
                piece = y[:, low - first : high - first]
                pieces.append(torch.addmm(piece, inner, self.left[:, low:high]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

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
