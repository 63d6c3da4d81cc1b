"""Budget: how small a plan has to be, and its text forms: 3.5bpw, 110MB, fits 8GiB @ 8192."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import NoReturn

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]+)")
FITS = re.compile(r"fits\s+(?P<size>.+?)\s*@\s*(?P<context>[0-9]+)(?:\s*x\s*(?P<batch>[0-9]+))?")


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that all have to hold; a field that is None limits nothing."""

    bpw: float | None = None  # bits for each weight of the blocks' linears, all bytes counted
    nbytes: int | None = None  # sum of the files of the checkpoint
    device_bytes: int | None = None  # memory that weights, cache and work must fit in when it runs
    context: int = 0  # tokens of a sequence in that memory
    batch: int = 1  # sequences
    loss: float | None = None  # quality floor, nats per token: the smallest plan not above it

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "4bpw", "4.2GiB", "fits 8GiB @ 8192x1" or "0.05nats", or several joined by "&".

        Raises ValueError for anything else, and for two limits of one kind.
        """
        fields: dict[str, float | int] = {}
        for piece in text.split("&"):
            found = _fields(piece.strip(), text)
            if fields.keys() & found.keys():
                _refuse(text, "it gives two limits of one kind")
            fields |= found
        return cls(**fields)  # type: ignore[arg-type]  # integers where _fields says so

    @classmethod
    def parse_list(cls, text: str) -> tuple["Budget", ...]:
        """Several budgets, separated by commas.  Raises ValueError as parse, or for one twice."""
        found = tuple(cls.parse(piece) for piece in text.split(","))
        if len(set(found)) < len(found):
            _refuse(text, "it names one budget twice")
        return found

    def linear_bytes(self, weights: int) -> int | None:
        """What bpw allows for `weights` weights, rounded down; exact for the decimal as written."""
        return None if self.bpw is None else math.floor(Fraction(str(self.bpw)) * weights / 8)

    def __str__(self) -> str:
        pieces = [] if self.bpw is None else [f"{_digits(self.bpw)}bpw"]
        pieces += [] if self.nbytes is None else [f"{self.nbytes}B"]
        if self.device_bytes is not None:
            pieces.append(f"fits {self.device_bytes}B @ {self.context}x{self.batch}")
        pieces += [] if self.loss is None else [f"{_digits(self.loss)}nats"]
        return " & ".join(pieces)


def _digits(number: float) -> str:
    """The number as people write it, so that parse reads it again."""
    return format(Decimal(repr(number)).normalize(), "f")


def _fields(piece: str, whole: str) -> dict[str, float | int]:
    """One limit by field name."""
    device = FITS.fullmatch(piece)
    if device:
        context, batch = int(device["context"]), int(device["batch"] or 1)
        if min(context, batch) < 1:
            _refuse(whole, "context and batch must be at least 1")
        size = _fields(device["size"], whole).get("nbytes")
        if size is None:
            _refuse(whole, f"{device['size']!r} is no size of a memory")
        return {"device_bytes": size, "context": context, "batch": batch}
    found = SIZE.fullmatch(piece)
    unit = found["unit"].lower() if found else ""
    number = Fraction(found["number"]) if found else Fraction(0)
    if number > 0 and unit == "bpw":
        return {"bpw": float(number)}
    if number > 0 and unit == "nats":
        return {"loss": float(number)}
    nbytes = math.floor(number * UNITS.get(unit, 0))
    if not nbytes:
        _refuse(whole, "a positive number and bpw, kB, MB, GB, KiB, MiB, GiB or nats are expected")
    return {"nbytes": nbytes}


def _refuse(text: str, why: str) -> NoReturn:
    raise ValueError(
        f"not a budget: {text!r}\n{why}\n"
        "try 4bpw, 110MB, 4.2GiB, fits 8GiB @ 8192x1, or 4bpw & 110MB for both"
    )
