"""How codes lie in memory for the GPU kernels: bit planes of 16-bit units, tile after tile.

A code of 3, 5, 6 or 8 bits is split into an upper and a lower plane (2+1, 4+1, 4+2, 4+4), so that
every plane has 1, 2 or 4 bits and 16 / bits codes, its fields, fill a 16-bit unit.  Nothing is
lost by it: a plane takes exactly its bits.

The fields of one unit belong to columns that lie `chunk` apart: of a run of fields * chunk
columns, field f of unit u is column f * chunk + u.  One shift and one mask of a register with two
units therefore give two weights that are neighbours in the same chunk of columns, which is the
order in which the matrix units want them, and a chunk reads a contiguous piece of the activations.
Of each plane 16 rows by `chunk` units are stored together, then the same rows' next run of
columns: a block of rows streams through contiguous memory in 16-byte accesses.

Every chunk lies in one group, so that scales multiply float32 sums of chunks, not weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aptq.core.bits import unpack
from aptq.core.grid import Grid
from aptq.core.parts import Quantized

PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
ZEROS = {"none": 0, "int": 1, "float": 2}
ROWS = 16  # rows stored together: as many as one matrix instruction takes
TILES = 4  # of rows of x: as many as the kernel of the layer gets
SPARE = 1.02  # a longer chunk may cost so much memory
REPACKED = 1 << 22  # weights repacked at once


class Layout(NamedTuple):
    """What a kernel has to know about one stored weight."""

    out: int
    columns: int
    bits: int
    group: int  # columns that share a scale, a multiple of chunk; 0 = all
    chunk: int  # columns that are multiplied at once: 16, 32 or 64
    zero: int  # 0 none, 1 whole, 2 real

    @property
    def planes(self) -> tuple[int, int]:
        """Bits of the upper and of the lower plane."""
        return PLANES[self.bits]

    @property
    def block(self) -> int:
        """Columns after which the units of all planes are complete."""
        return max(16 // bits for bits in self.planes if bits) * self.chunk

    @property
    def padded(self) -> int:
        """Rows that are stored."""
        return -(-self.out // ROWS) * ROWS

    @property
    def tiles(self) -> int:
        """Tiles of a product's result at most that several programs sum up."""
        return TILES * self.padded // ROWS

    @property
    def counters(self) -> int:
        """For these tiles, and two for each of rows of x that low-rank factors are added to."""
        return self.tiles + 2 * TILES

    def units(self, plane: int) -> int:
        """16-bit units of a plane, 0 or 1."""
        bits = self.planes[plane]
        run = 16 // bits * self.chunk if bits else 1
        return self.padded * -(-self.columns // run) * self.chunk if bits else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        groups = -(-self.columns // self.group) if self.group else 1
        return 2 * (self.units(0) + self.units(1)) + (2 + self.zero) * groups * self.padded


def layout_of(grid: Grid, shape: tuple[int, int]) -> Layout:
    """The layout with the longest chunk that costs no memory worth mentioning."""
    out, columns = shape
    group = grid.group if grid.group < columns else 0
    zero = ZEROS[grid.zero]
    make = [Layout(out, columns, grid.bits, group, chunk, zero) for chunk in (64, 32, 16)]
    shortest = make[-1].nbytes
    for layout in make:
        fits = columns % layout.chunk == 0 and layout.group % layout.chunk == 0
        if fits and layout.block <= 512 and layout.nbytes <= SPARE * shortest:
            return layout
    return make[-1]


class Buffers(NamedTuple):
    """codes int16 [units of both planes]; counts int32, zeros between products; scale [groups,
    padded] as stored; zero uint8 or as scale [groups, padded], or None."""

    codes: Tensor
    counts: Tensor
    scale: Tensor
    zero: Tensor | None


def repack(part: Quantized, layout: Layout) -> Buffers:
    """The part's tensors in the order of `layout`, on their device."""
    codes = part.codes.new_empty(layout.units(0) + layout.units(1), dtype=torch.int16)
    upper, lower = codes.split([layout.units(0), layout.units(1)])
    step = max(1, REPACKED // layout.columns // ROWS) * ROWS
    for start in range(0, layout.padded, step):
        stop = min(start + step, layout.out)
        rows = _codes(part, start, stop)
        shift = layout.planes[1]
        for plane, target, values in ((0, upper, rows >> shift), (1, lower, rows % (1 << shift))):
            if layout.planes[plane]:
                piece = _units(values, layout.planes[plane], layout.chunk)
                first = start * (len(target) // layout.padded)
                target[first : first + piece.numel()] = piece
    scale, zero = part.scales()
    counts = codes.new_zeros(layout.counters, dtype=torch.int32)
    return Buffers(
        codes, counts, _turned(scale, layout), None if zero is None else _turned(zero, layout)
    )


def _codes(part: Quantized, start: int, stop: int) -> Tensor:
    """Codes int16 [rows, columns] with rows of zeros up to a multiple of ROWS."""
    rows = unpack(part.codes[start:stop], part.grid.bits, part.shape[1])
    return pad(rows.short(), (0, 0, 0, -len(rows) % ROWS))


def _units(values: Tensor, bits: int, chunk: int) -> Tensor:
    """Values int16 [rows, columns] of a plane -> its units, flat."""
    fields = 16 // bits
    spare = -values.shape[1] % (fields * chunk)
    values = pad(values, (0, spare))
    tiles = values.view(len(values) // ROWS, ROWS, -1, fields, chunk).transpose(1, 2).int()
    places = torch.arange(fields, device=values.device, dtype=torch.int32) * bits
    # fields do not overlap, so their sum is their union; the sign bit wraps around
    units = (tiles << places[:, None]).sum(3, dtype=torch.int32)
    return units.to(torch.int16).flatten()


def codes_of(plane: Tensor, layout: Layout, number: int, rows: Tensor) -> Tensor:
    """What `_units` made of some rows [n]: int32 [n, columns and what was padded]."""
    bits = layout.planes[number]
    tiles = plane.view(layout.padded // ROWS, -1, ROWS, layout.chunk)
    units = tiles[rows // ROWS, :, rows % ROWS].int()
    places = torch.arange(16 // bits, device=plane.device, dtype=torch.int32) * bits
    found = (units[:, :, None] >> places[:, None]) & ((1 << bits) - 1)
    return found.flatten(1)


def _turned(values: Tensor, layout: Layout) -> Tensor:
    """[out, groups] -> [groups, padded]."""
    spare = layout.padded - layout.out
    return pad(values.T, (0, spare)).contiguous()
