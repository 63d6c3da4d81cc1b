"""Target: what a linear shall become, a sum of parts, each told by its PartSpec.

The text of a target is that of its parts: "int3-g64-z+o0.5%+r32" is a 3-bit grid, half a percent of
single weights in 16 bits and a product of factors of rank 32.
"""

import re
from dataclasses import dataclass
from typing import Literal

from aptq.core.grid import Grid

KEEP = "keep"  # text form of a target without parts
SHARE = 10_000  # outliers are counted in so many parts of the weights
NARROW = 1 << 16  # columns up to which the place of an outlier in its row takes two bytes
Kind = Literal["quantized", "graded", "dense", "sparse", "lowrank"]
ORDER: tuple[Kind, ...] = ("quantized", "graded", "dense", "sparse", "lowrank")
CODED = ("quantized", "graded", "dense")  # parts that hold something for every place


def gradable(grid: Grid) -> bool:
    """Can groups of this grid have widths of their own?"""
    whole = grid.group > 0 and grid.group % 8 == 0
    return not grid.special and not grid.dense and grid.zero == "int" and grid.bits < 8 and whole


@dataclass(frozen=True, slots=True)
class PartSpec:
    """What one part of a weight will be: codes on a grid, single weights, or two factors."""

    grid: Grid | None = None  # of the codes; with a rank of the factors, which else have 16 bits
    rank: int = 0  # columns of the factors; 0: no factors
    outliers: int = 0  # single weights in 16 bits, so many of SHARE; 0: none
    graded: bool = False  # groups have widths of their own, those of the grid on average

    @property
    def kind(self) -> Kind:
        """Which type of part it is."""
        if self.rank:
            return "lowrank"
        if self.outliers:
            return "sparse"
        if self.graded:
            return "graded"
        return "dense" if self.grid is not None and self.grid.dense else "quantized"

    @property
    def bits(self) -> int:
        """Bits of the codes of one weight; 0 of parts without codes."""
        return self.grid.bits if self.grid is not None and not self.rank else 0

    def count(self, shape: tuple[int, int]) -> int:
        """Outliers of a weight of shape (out, in)."""
        return self.outliers * shape[0] * shape[1] // SHARE

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes stored for a weight of shape (out, in)."""
        if self.kind == "lowrank":
            sizes = [(self.rank, length) for length in shape]
            grid = self.grid or Grid("bf16")
            return sum(grid.nbytes(size) for size in sizes)
        if self.kind == "sparse":
            place = 2 if shape[1] <= NARROW else 4
            return self.count(shape) * (2 + place) + 4 * (shape[0] + 1)
        assert self.grid is not None, self
        if self.graded:  # zeros have the bits of the widest, and each group has its width
            groups = self.grid.groups(shape[1])
            zeros = -(-shape[0] * groups * (self.grid.bits + 1) // 8)
            return shape[0] * (shape[1] * self.grid.bits // 8 + 2 * groups) + zeros + groups
        return self.grid.nbytes(shape)

    def fits(self, shape: tuple[int, int]) -> bool:
        """Can it be a part of a weight of shape (out, in)?"""
        lengths = shape if self.rank else shape[1:]
        if self.graded and self.grid is not None and shape[1] % self.grid.group:
            return False
        held = self.grid is None or all(self.grid.fits(length) for length in lengths)
        return held and self.rank <= min(shape)

    def __str__(self) -> str:
        if self.kind == "lowrank":
            return f"r{self.rank}" + (f"@{self.grid}" if self.grid is not None else "")
        if self.kind == "sparse":
            return f"o{self.outliers / 100:g}%"
        return f"{self.grid}~" if self.graded else str(self.grid)

    @classmethod
    def parse(cls, text: str) -> "PartSpec":
        """The inverse of str(part).  Raises ValueError."""
        if found := re.fullmatch(r"r([1-9]\d{0,5})(?:@(.{1,32}))?", text):
            grid = None if found[2] is None else Grid.parse(found[2])
            if grid is None or not (grid.dense or grid.special):
                return cls(grid, rank=int(found[1]))
        elif found := re.fullmatch(r"o(\d{1,2}(?:\.\d{1,2})?)%", text):
            outliers = round(float(found[1]) * 100)
            if outliers:
                return cls(outliers=outliers)
        elif text.endswith("~"):
            grid = Grid.parse(text[:-1])
            if gradable(grid):
                return cls(grid, graded=True)
        elif not re.match(r"[ro]\d", text):
            return cls(Grid.parse(text))
        raise ValueError(
            f"{text!r} is no part of a weight\n"
            "known: a grid, int3-g32-z~ (mixed), r32, r32@int8-row (factors), o0.5% (outliers)\n"
            "ranks are at least 1, outliers 0.01 to 99.99 percent, ~ needs groups of eights and -z"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """What one linear shall become: the sum of these parts, or itself if there are none."""

    parts: tuple[PartSpec, ...] = ()

    @property
    def kept(self) -> bool:
        """True if the linear stays as it is."""
        return not self.parts

    @property
    def plain(self) -> bool:
        """Is it kept, or a single grid for the whole weight?"""
        return self.kept or isinstance(_simple(self), Grid)

    @property
    def grid(self) -> Grid | None:
        """The grid of the weight's codes (or its 16-bit one) if exactly one part has codes."""
        found = [part.grid for part in self.parts if part.kind in CODED]
        return found[0] if len(found) == 1 else None

    @property
    def rank(self) -> int:
        """Columns of all factors."""
        return sum(part.rank for part in self.parts)

    @property
    def bits(self) -> int:
        """Bits of the codes of one weight; 16 if it is kept."""
        return 16 if self.kept else sum(part.bits for part in self.parts)

    def nbytes(self, shape: tuple[int, int], itemsize: int = 2) -> int:
        """Bytes stored for a weight of shape (out, in); itemsize is that of a kept weight."""
        if self.kept:
            return itemsize * shape[0] * shape[1]
        return sum(part.nbytes(shape) for part in self.parts)

    def fits(self, shape: tuple[int, int]) -> bool:
        """Can a weight of shape (out, in) be stored so?"""
        return all(part.fits(shape) for part in self.parts)

    def part(self, kind: Kind) -> PartSpec | None:
        """The one part of a kind, if there is one."""
        return next((part for part in self.parts if part.kind == kind), None)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts)) or KEEP

    @classmethod
    def parse(cls, text: str) -> "Target":
        """The inverse of str(target); grids first, then outliers, then factors.

        Raises ValueError.
        """
        if text == KEEP:
            return cls()
        parts = tuple(PartSpec.parse(part) for part in text.split("+"))
        kinds = [part.kind for part in parts]
        single = all(kinds.count(kind) <= 1 for kind in ("sparse", "lowrank"))
        if not single or kinds != sorted(kinds, key=ORDER.index):
            raise ValueError(
                f"{text!r} is no sum of parts\n{', '.join(kinds)}\n"
                "write grids first, then at most one share of outliers, then at most one rank"
            )
        return cls(parts)


Candidate = Grid | Target  # a grid stands for the target with that one part


def candidate(text: str) -> Candidate:
    """A grid where the text is that of one, else a target.  Raises ValueError."""
    return _simple(Target.parse(text))


def _simple(target: Target) -> Candidate:
    whole = len(target.parts) == 1 and target.parts[0].kind in ("quantized", "dense")
    return target.grid if target.grid is not None and whole else target


def target_of(given: Candidate) -> Target:
    """The target that a candidate stands for."""
    return given if isinstance(given, Target) else Target((PartSpec(given),))
