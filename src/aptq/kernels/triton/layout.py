"""How codes lie in memory for the GPU kernels: whole codes in 16-bit units, tile after tile.

A unit holds 16 // bits codes, its fields.  Where they leave bits free (one of 3 and 5 bits, four of
6, two of 7), as many units as fill up hold the last codes of a block in those: 3 units have 5 codes
of 3 bits each and a sixteenth in three spare bits.  Every code takes exactly its bits.

The codes of a block that share a unit belong to columns that lie `chunk` apart: code c of the units
number u is column c * chunk + u of the block.  A logical operation on a register with two units
therefore gives two weights that are neighbours in the same chunk of columns, which is the order in
which the matrix units want them, and a chunk reads a contiguous piece of the activations.  16 rows
by `chunk` units are stored together, then the same rows' next units: rows stream through contiguous
memory in 16-byte accesses.

Every chunk lies in one group, so that scales multiply float32 sums of chunks, not weights.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aptq.core.bits import unpack
from aptq.core.grid import Grid
from aptq.core.parts import Quantized

BITS = (2, 3, 4, 5, 6, 7, 8)
ZEROS = {"none": 0, "int": 1, "float": 2}
ROWS = 16  # rows stored together: as many as one matrix instruction takes
TILES = 4  # of rows of x: as many as the kernel of the layer gets
SPARE = 1.02  # a longer chunk may cost so much memory
REPACKED = 1 << 22  # weights repacked at once


def units_of(bits: int) -> int:
    """Units of a block: as few as codes of so many bits fill."""
    return bits // gcd(bits, 16)


def block_codes(bits: int) -> int:
    """Codes of a block, which lie a chunk apart."""
    return 16 * units_of(bits) // bits


class Layout(NamedTuple):
    """What a kernel has to know about one stored weight."""

    out: int
    columns: int
    bits: int
    group: int  # columns that share a scale, a multiple of chunk; 0 = all
    chunk: int  # columns that are multiplied at once: 16, 32 or 64
    zero: int  # 0 none, 1 whole, 2 real

    @property
    def units(self) -> int:
        """Of a block, one after another."""
        return units_of(self.bits)

    @property
    def block(self) -> int:
        """Columns of a block."""
        return block_codes(self.bits) * self.chunk

    @property
    def runs(self) -> int:
        """Units of a row over chunk; of the last block those that hold codes."""
        rest = -(-(self.columns % self.block) // self.chunk)
        last = min(self.units, -(-rest // (16 // self.bits)))
        return self.columns // self.block * self.units + last

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

    @property
    def size(self) -> int:
        """16-bit units of all codes."""
        return self.padded * self.runs * self.chunk

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        groups = -(-self.columns // self.group) if self.group else 1
        return 2 * self.size + (2 + self.zero) * groups * self.padded


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
    """codes int16 [size]; counts int32, zeros between products; scale [groups,
    padded] as stored; zero uint8 or as scale [groups, padded], or None."""

    codes: Tensor
    counts: Tensor
    scale: Tensor
    zero: Tensor | None


def repack(part: Quantized, layout: Layout) -> Buffers:
    """The part's tensors in the order of `layout`, on their device."""
    codes = part.codes.new_empty(layout.size, dtype=torch.int16)
    step = max(1, REPACKED // layout.columns // ROWS) * ROWS
    for start in range(0, layout.padded, step):
        piece = _units(_codes(part, start, min(start + step, layout.out)), layout)
        first = start * layout.runs * layout.chunk
        codes[first : first + piece.numel()] = piece
    scale, zero = part.scales()
    counts = codes.new_zeros(layout.counters, dtype=torch.int32)
    return Buffers(
        codes, counts, _turned(scale, layout), None if zero is None else _turned(zero, layout)
    )


def _codes(part: Quantized, start: int, stop: int) -> Tensor:
    """Codes int16 [rows, columns] with rows of zeros up to a multiple of ROWS."""
    rows = unpack(part.codes[start:stop], part.grid.bits, part.shape[1])
    return pad(rows.short(), (0, 0, 0, -len(rows) % ROWS))


def _units(codes: Tensor, layout: Layout) -> Tensor:
    """Codes int16 [rows, columns] -> their units, flat."""
    bits, units = layout.bits, layout.units
    fields, free = 16 // bits, 16 % bits
    codes = pad(codes, (0, -codes.shape[1] % layout.block))
    blocks = codes.view(len(codes) // ROWS, ROWS, -1, layout.block // layout.chunk, layout.chunk)
    blocks = blocks.transpose(1, 2).int()  # tile, block, row, code, chunk
    direct, spare = blocks.tensor_split([units * fields], 3)
    places = torch.arange(fields, device=codes.device, dtype=torch.int32) * bits
    # fields do not overlap, so their sum is their union; the sign bit wraps around
    made = (direct.unflatten(3, (units, fields)) << places[:, None]).sum(4, dtype=torch.int32)
    if free:
        stream = (spare << places[: spare.shape[3], None]).sum(3, keepdim=True, dtype=torch.int32)
        shifts = torch.arange(units, device=codes.device, dtype=torch.int32)[:, None] * free
        made += ((stream >> shifts) & ((1 << free) - 1)) << 16 - free
    runs = made.transpose(2, 3).flatten(1, 2)[:, : layout.runs]
    return runs.to(torch.int16).flatten()


def codes_of(stored: Tensor, layout: Layout, rows: Tensor) -> Tensor:
    """What `repack` stored of some rows [n]: codes int32 [n, columns and what was padded]."""
    bits, units = layout.bits, layout.units
    fields, free = 16 // bits, 16 % bits
    tiles = stored.view(layout.padded // ROWS, layout.runs, ROWS, layout.chunk)
    held = tiles[rows // ROWS, :, rows % ROWS].int()
    held = pad(held, (0, 0, 0, -layout.runs % units)).unflatten(1, (-1, units))
    places = torch.arange(fields, device=stored.device, dtype=torch.int32) * bits
    found = ((held[:, :, :, None] >> places[:, None]) & ((1 << bits) - 1)).flatten(2, 3)
    if free:
        shifts = torch.arange(units, device=stored.device, dtype=torch.int32)[:, None] * free
        stream = ((held >> 16 - free & ((1 << free) - 1)) << shifts).sum(2, True, dtype=torch.int32)
        spare = stream >> places[: units * free // bits, None] & ((1 << bits) - 1)
        found = torch.cat([found, spare], 2)
    return found.flatten(1)


def _turned(values: Tensor, layout: Layout) -> Tensor:
    """[out, groups] -> [groups, padded]."""
    spare = layout.padded - layout.out
    return pad(values.T, (0, spare)).contiguous()
