"""Lanes: products with codes of 2 to 8 bits at the speed of the memory, on CPUs, through numba."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from aptq.core.bits import unpack
from aptq.core.grid import Grid
from aptq.core.parts import Part, Quantized
from aptq.core.rounding import Scales, decode
from aptq.kernels.reference import CACHE_TILE, Kernel

LANES, STEP = 32, 32  # rows of the weight side by side in vector registers; columns of one step
MANY = 40  # from so many rows of x on, decoding tiles for torch's own product wins (measured)
JOB = ctypes.c_int64 * 16  # see cpu_code
GROWTH = 1.12  # storage may grow by this at most: rows and columns are filled up, zeros unpacked


class Lanes(Kernel):
    """y = sum over groups of scale * (codes @ x - zero * sum(x)), in float32.

    words int32 [tiles, chunks, bits, LANES]: the stored bit stream of every row in words of 32
    bits, with LANES rows side by side; `bits` words hold STEP columns.  scale and zero are
    [tiles, groups, LANES] as stored, but whole zeros uint8.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, words: Tensor, scales: Scales, grid: Grid, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        size = min(grid.group or shape[1], shape[1])
        self.grid, self.tiles = grid, len(words)
        self.layout = words.shape[1], -(-size // STEP)  # chunks, and those that share a scale
        self.made: tuple[int, Any] = (0, None)  # address of the words, and a job with them
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("scale", scales.scale, persistent=False)
        self.register_buffer("zero", scales.zero, persistent=False)

    @classmethod
    def supports(cls, part: Part, device: torch.device, dtype: torch.dtype) -> bool:
        """Even steps, groups of a multiple of 32, and numba (extra "cpu") installed."""
        if not isinstance(part, Quantized) or part.grid.special or device.type != "cpu":
            return False
        (out, columns), size = part.shape, part.grid.group
        if (size and size < columns and size % STEP) or out * columns == 0:
            return False
        rows, groups = -(-out // LANES) * LANES, part.grid.groups(columns)
        zeros = {"none": 0, "int": 1, "float": 2}[part.grid.zero]
        held = rows * (-(-columns // STEP) * 4 * part.grid.bits + groups * (2 + zeros))
        return held <= GROWTH * part.nbytes and dtype.is_floating_point and _numba()

    @classmethod
    def prepare(cls, part: Part, dtype: torch.dtype) -> Kernel:
        """Put words of 32 rows side by side."""
        assert isinstance(part, Quantized), type(part)
        grid, (out, columns) = part.grid, part.shape
        tiles, chunks = -(-out // LANES), -(-columns // STEP)
        codes = part.codes.new_zeros(tiles * LANES, chunks * 4 * grid.bits)
        codes[:out, : part.codes.shape[1]] = part.codes
        words = codes.view(torch.int32).view(tiles, LANES, chunks, grid.bits)
        scales = part.scales()
        zero = None if scales.zero is None else _beside(scales.zero, tiles)
        held = Scales(_beside(scales.scale, tiles), zero)
        return cls(words.permute(0, 2, 3, 1).contiguous(), held, grid, part.shape)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        if not (x.is_cpu and self._buffers["words"].is_cpu):  # addresses of a GPU would be read
            raise ValueError(
                f"a packed layer was prepared for another device\nactivations are on {x.device}, "
                f"weights on {self.words.device}, both must be on cpu\n"
                "load the checkpoint again on the device that you want"
            )
        rows, dtype = x.shape[0], x.dtype
        if rows >= MANY or (x.requires_grad and torch.is_grad_enabled()):
            y = self._multiply(x)
        elif dtype == torch.bfloat16:
            y = x.new_empty(rows, self.shape[0])
            self._run("product", x, y, 0, self.tiles)
        else:
            x = x.float()
            y = x.new_empty(rows, self.shape[0])
            self._run("product", x, y, 0, self.tiles)
            y = y.to(dtype)
        return y if bias is None else y + bias

    def _multiply(self, x: Tensor) -> Tensor:
        """The same by decoding [in, some rows] at a time."""
        (out, columns), chunks, outputs = self.shape, -(-self.shape[1] // STEP), []
        step = max(1, CACHE_TILE // (chunks * STEP * LANES))
        exact = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        for first in range(0, self.tiles, step):
            stop = min(first + step, self.tiles)
            tile = torch.empty(chunks * STEP, (stop - first) * LANES, dtype=exact)
            self._run("decoded", x, tile, first, stop)
            outputs.append(x @ tile[:columns, : out - first * LANES].to(x.dtype))
        return torch.cat(outputs, 1)

    def _run(self, name: str, x: Tensor, y: Tensor, first: int, stop: int) -> None:
        """Let torch's threads do a job of cpu_code on tiles first..stop-1."""
        held = self._buffers  # attributes of a module take half a microsecond each
        words = held["words"].data_ptr()
        if self.made[0] != words:  # before the first product, and where the tensors have moved
            self.made = words, self._fixed()
        job = JOB.from_buffer_copy(self.made[1])  # of this call alone: threads may share a model
        job[3], job[4], job[8] = x.data_ptr(), y.data_ptr(), x.shape[0]
        job[5], job[6], job[7] = first, stop, first
        job[12], job[15] = y.shape[1], x.dtype == torch.bfloat16
        _team()(_code(name, self.grid.bits), job, torch.get_num_threads(), 0)

    def _fixed(self) -> Any:
        """What all jobs have in common; the rest is 0."""
        scale, zero = self.scale, self.zero
        return JOB(
            self.words.data_ptr(),
            scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            *(0,) * 6,
            self.shape[1],
            *self.layout,
            0,
            scale.dtype == torch.bfloat16,
            0 if zero is None else zero.itemsize,
            0,
        )

    def rows(self, rows: Tensor) -> Tensor:
        """Rows [n] int64 of the weight, in any order: float32 [n, in]."""
        stream = _picked(self.words, rows).view(torch.uint8)
        bits, columns = self.grid.bits, self.shape[1]
        codes = unpack(stream, bits, stream.shape[1] * 8 // bits)[:, :columns]
        zero = None if self.zero is None else _picked(self.zero, rows)
        return decode(codes, Scales(_picked(self.scale, rows), zero), self.grid)


def _picked(values: Tensor, rows: Tensor) -> Tensor:
    """Rows [n] out of [tiles, ..., LANES]: [n, ...] flat; indexing two dimensions copies it all."""
    count = values[0].numel() // LANES
    first = rows // LANES * (count * LANES) + rows % LANES
    return values.flatten()[first[:, None] + torch.arange(count) * LANES]


def _beside(values: Tensor, tiles: int) -> Tensor:
    """[out, groups] -> [tiles, groups, LANES], zeros in the rows that fill up."""
    filled = values.new_zeros(tiles * LANES, values.shape[1])
    filled[: len(values)] = values
    return filled.view(tiles, LANES, -1).transpose(1, 2).contiguous()


@cache
def _numba() -> bool:
    return find_spec("numba") is not None


@cache
def _code(name: str, bits: int) -> int:
    """Address of a function of cpu_code, compiled; importing numba takes most of a second."""
    from aptq.kernels import cpu_code

    makers = {"product": cpu_code.product, "decoded": cpu_code.decoded}
    address: int = makers[name](bits).address
    return address


@cache
def _team() -> Callable[[int, Any, int, int], object]:
    """Runs a function in the threads of torch's own OpenMP: GOMP_parallel of its library.

    A second pool of threads would fight with the first one for the cores.  Where there is no such
    library (macOS, Windows), one thread does all: tiles are taken until there are none.
    """
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (TypeError, OSError, AttributeError):
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        return lambda work, job, _threads, _flags: call(work)(ctypes.addressof(job))
    found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    found.restype = None
    return found
