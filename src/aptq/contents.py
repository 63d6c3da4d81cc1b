"""What is in a run or checkpoint, and what the package offers: the data of `info` and `list`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aptq.allocate import allocators
from aptq.engine.stage import methods
from aptq.options import Option, describe
from aptq.report import summary
from aptq.report.summary import Summary
from aptq.store.checkpoint import Checkpoint
from aptq.store.verify import Account, Verified, account
from aptq.store.verify import verify as sound


@dataclass(frozen=True, slots=True)
class LayerLine:
    """One linear of the plan."""

    name: str
    grid: str
    bits: float
    nbytes: int
    error: float | None  # |W - Q|^2 / |W|^2, known where the log of the run is there


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint; `run` only where the folder of its run was given."""

    source: str
    model_type: str
    package: str
    bits: float
    nbytes: int
    layers: tuple[LayerLine, ...]
    parameters: Account
    verified: Verified | None
    run: Summary | None

    def to_json(self) -> dict[str, Any]:
        """The contents as plain values."""
        run = None if self.run is None else self.run.to_json()
        parameters = {**self.parameters._asdict(), "total": self.parameters.total}
        verified = None if self.verified is None else self.verified._asdict()
        return {**asdict(self), "parameters": parameters, "verified": verified, "run": run}


def contents(folder: Path, *, verify: bool = False) -> Contents:
    """Open the checkpoint in `folder` and check it; with `verify` also every hash and value.

    Raises ValueError where there is none, Corrupt where it is damaged.
    """
    checkpoint = Checkpoint.open(folder)
    verified = sound(checkpoint) if verify else None
    logged = (folder / "log.jsonl").is_file()
    errors = summary.errors(folder) if logged else {}
    manifest = checkpoint.manifest
    itemsize = 4 if manifest.dtype == "float32" else 2
    lines = []
    for name, target in checkpoint.plan.targets.items():
        shape = manifest.shapes[name]
        nbytes = target.nbytes(shape, itemsize)
        bits = 8 * nbytes / (shape[0] * shape[1])
        lines.append(LayerLine(name, str(target), bits, nbytes, errors.get(name)))
    return Contents(
        source=manifest.source,
        model_type=manifest.model_type,
        package=manifest.package,
        bits=checkpoint.plan.bits(manifest.shapes, itemsize),
        nbytes=checkpoint.nbytes,
        layers=tuple(lines),
        parameters=account(checkpoint),
        verified=verified,
        run=summary.read(folder) if logged else None,
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """One method: its name, family, first line of its file, and options."""

    name: str
    family: str
    about: str
    options: tuple[Option, ...]

    def to_json(self) -> dict[str, Any]:
        """The entry as plain values."""
        options = [option._asdict() for option in self.options]
        return {"name": self.name, "family": self.family, "about": self.about, "options": options}


def catalogue(name: str | None = None) -> list[Entry]:
    """All methods and allocators, or the one called `name`.  ValueError with close names."""
    found: list[tuple[str, str, type]] = [
        (method, family, methods.get(method))
        for family, names in methods.families().items()
        for method in names
        if name in (None, method)
    ]
    found += [(n, "allocate", allocators.get(n)) for n in allocators.names() if name in (None, n)]
    if name is not None and not found:
        methods.get(name)
    return [Entry(n, family, _about(cls), tuple(describe(cls))) for n, family, cls in found]


def _about(cls: type) -> str:
    """The docstring of a class as one line."""
    return " ".join((cls.__doc__ or "").split())
