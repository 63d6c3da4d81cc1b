"""Grid: the values a weight may take, its exact size in bytes, and its text form "int4-g64-z"."""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor

from aptq.core.kquants import IQ4, KQUANTS, SUPER, KQuant

Zero = Literal["none", "int", "float"]
ScaleName = Literal["fp16", "bf16"]

SCALE_DTYPES: dict[ScaleName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
ZERO_SUFFIX: dict[Zero, str] = {"none": "", "int": "-z", "float": "-fz"}


@dataclass(frozen=True, slots=True)
class Element:
    """One storage format of a weight: its name and its bits."""

    name: str
    bits: int


ELEMENTS: dict[str, Element] = {f"int{bits}": Element(f"int{bits}", bits) for bits in range(2, 9)}
ELEMENTS["bf16"] = Element("bf16", 16)
# GGUF's super-block types: one spelling each, no group or zero to choose
ELEMENTS |= {name: Element(name, kind.bits) for name, kind in KQUANTS.items()}
ELEMENTS["iq4_nl"] = Element("iq4_nl", 4)  # the table of iq4_xs with an fp16 scale for 32 columns

FORM = re.compile(
    r"(?P<element>int[2-8])-(?:g(?P<group>[1-9][0-9]{0,8})|row)"
    r"(?:-(?P<zero>z|fz))?(?:-(?P<scale>bf16))?"
)
EXAMPLES = ("int4-g64-z", "int3-g128", "int4-row", "int8-g32-fz", "int4-g64-z-bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Grid:
    """Integer codes with one scale (and zero) for each row and group of input columns.

    A stored code c stands for (c - zero) * scale.  Without a zero it stands for
    (c - 2^(bits - 1)) * scale, where the scale may be negative.
    Raises ValueError when a field is not one of the listed values.
    """

    element: str = "int4"
    group: int = 128  # input columns that share a scale; 0 = whole row; the last may be shorter
    zero: Zero = "none"
    scale: ScaleName = "fp16"

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            _refuse(self.element, f"unknown element {self.element!r}", tuple(ELEMENTS))
        if self.group < 0 or self.zero not in ZERO_SUFFIX or self.scale not in SCALE_DTYPES:
            shown = f"group={self.group} zero={self.zero!r} scale={self.scale!r}"
            _refuse(shown, "group must be >= 0, zero none|int|float, scale fp16|bf16", EXAMPLES)
        kind = self.kind
        if self.dense or self.special:  # one spelling only, so that equal grids compare equal
            zero = "float" if kind is not None and kind.minimum else "none"
            group = 0 if self.dense else 32 if kind is None else kind.group
            for name, value in (("group", group), ("zero", zero), ("scale", "fp16")):
                object.__setattr__(self, name, value)

    @property
    def dense(self) -> bool:
        """True for bf16: the weight is stored as it is, without codes."""
        return self.element == "bf16"

    @property
    def kind(self) -> KQuant | None:
        """The super-block type: its scales and real zeros are stored as whole numbers."""
        return KQUANTS.get(self.element)

    @property
    def table(self) -> Tensor | None:
        """What codes stand for where that is no even step, float32 [levels], ascending."""
        return torch.tensor(IQ4, dtype=torch.float32) if self.element.startswith("iq4") else None

    @property
    def special(self) -> bool:
        """Is it a type of GGUF's own: scales that do not move freely, or levels from a table?"""
        return self.kind is not None or self.table is not None

    def fits(self, columns: int) -> bool:
        """Can rows of so many columns be stored?"""
        return columns % (SUPER if self.kind is not None else 32 if self.special else 1) == 0

    @property
    def bits(self) -> int:
        """Bits of one stored weight, scales not counted."""
        return ELEMENTS[self.element].bits

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales and float zeros: as stored, of super-blocks as computed."""
        return torch.float32 if self.kind is not None else SCALE_DTYPES[self.scale]

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights."""
        if self.dense:
            return 0
        return math.ceil(columns / self.group) if self.group else 1

    def group_of(self, columns: int) -> Tensor:
        """Group id of each input column, LongTensor [columns]."""
        return torch.arange(columns) // (self.group or columns)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes that are written for a weight of `shape` (out, in), nothing left out."""
        rows, columns = shape
        if self.dense:
            return 2 * rows * columns
        if self.kind is not None:
            return rows * columns // SUPER * self.kind.nbytes
        scales = rows * self.groups(columns)
        codes = rows * math.ceil(columns * self.bits / 8)  # each row starts at a byte
        zeros = {"none": 0, "int": math.ceil(scales * self.bits / 8), "float": 2 * scales}
        return codes + 2 * scales + zeros[self.zero]

    def __str__(self) -> str:
        if self.dense or self.special:
            return self.element
        group = f"g{self.group}" if self.group else "row"
        scale = "" if self.scale == "fp16" else f"-{self.scale}"
        return f"{self.element}-{group}{ZERO_SUFFIX[self.zero]}{scale}"

    @classmethod
    def parse(cls, text: str) -> "Grid":
        """The inverse of str(grid).  Raises ValueError with close matches."""
        if not text.startswith("int") and text in ELEMENTS:
            return cls(element=text)
        found = FORM.fullmatch(text)
        if found is None:
            form = "the form is int<2..8>-(g<columns>|row)[-z|-fz][-bf16], or bf16"
            form += ", or of GGUF's iq4_nl, " + ", ".join(KQUANTS)
            _refuse(text, form, EXAMPLES)
        zeros: dict[str | None, Zero] = {None: "none", "z": "int", "fz": "float"}
        return cls(
            element=found["element"],
            group=int(found["group"] or 0),
            zero=zeros[found["zero"]],
            scale="bf16" if found["scale"] else "fp16",
        )


def _refuse(given: str, why: str, known: tuple[str, ...]) -> NoReturn:
    close = difflib.get_close_matches(given, known, n=3, cutoff=0.4) or known
    raise ValueError(f"not a grid: {given!r}\n{why}\ntry {', '.join(close)}")
