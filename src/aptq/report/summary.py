"""Summary of a run folder: one row a role of layers, totals, and the evaluation if there is one."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """Layers of one role that have one grid."""

    role: str
    grid: str
    layers: int
    bits: float  # stored bits per weight, scales and zeros included
    error: float  # mean over the layers of |W - Q|^2 / |W|^2
    before: int  # bytes
    after: int
    fallbacks: int  # layers that needed a rescue


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers.  bytes_before and bytes_after are of whole checkpoints, rows of layers."""

    source: str
    rows: tuple[Row, ...]
    bits: float
    bytes_before: int
    bytes_after: int
    seconds: float
    tokens: int  # of calibration text
    counts: dict[str, float]  # what stages reported, summed over the layers
    evaluation: dict[str, Any] | None
    rule: dict[str, str] | None = None  # who made the plan, and how
    expected_loss: tuple[float, float] | None = None  # nats per token and standard error
    blocks: tuple[tuple[float, float], ...] = ()  # bits per weight and mean error of each block
    phases: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds, bytes of memory
    parameters: dict[str, int] = field(default_factory=dict)  # compressed, kept, skipped, total
    routed: tuple[int, int] | None = None  # fewest and most tokens that reached an expert

    @property
    def histogram(self) -> dict[str, int]:
        """Layers of each grid, the most frequent first."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts[row.grid] += row.layers
        return dict(counts.most_common())

    @property
    def roles(self) -> tuple[Row, ...]:
        """One row a role, whatever grids its layers have."""
        alike: dict[str, list[Row]] = {}
        for row in self.rows:
            alike.setdefault(row.role, []).append(row)
        return tuple(_merged(rows) for rows in alike.values())

    @property
    def fallbacks(self) -> int:
        """Layers that needed a rescue."""
        return sum(row.fallbacks for row in self.rows)

    @property
    def layers(self) -> int:
        """Linears inside the blocks, compressed or kept."""
        return sum(row.layers for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return {**asdict(self), "layers": self.layers, "fallbacks": self.fallbacks}


def read(folder: Path) -> Summary:
    """Summary of the run in `folder`, from its log.jsonl and eval.json.  Raises ValueError."""
    try:
        log = events(folder)
        (start,), (done,) = log["start"], log["done"]
        layers = log["layer"]
        counts: Counter[str] = Counter()
        for layer in layers:
            counts.update(layer["counts"])
        reached = [x["counts"]["tokens"] for x in layers if "tokens" in x["counts"]]
        counts.pop("tokens", None)
        evaluated = folder / "eval.json"
        return Summary(
            source=start["source"],
            rows=tuple(_rows(layers)),
            bits=start["bits"],
            bytes_before=start["bytes_before"],
            bytes_after=done["bytes_after"],
            seconds=done["seconds"],
            tokens=start["data"]["tokens_used"] if start["data"] else 0,
            counts=dict(counts),
            evaluation=json.loads(evaluated.read_text("utf-8")) if evaluated.is_file() else None,
            rule=start.get("rule"),
            expected_loss=tuple(start["expected_loss"]) if "expected_loss" in start else None,
            blocks=tuple(_blocks(layers)),
            phases=_phases(log),
            parameters=_parameters(start, layers),
            routed=(int(min(reached)), int(max(reached))) if reached else None,
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _broken(folder, error) from error


def errors(folder: Path) -> dict[str, float]:
    """Relative squared error of every layer of the run in `folder`.  Raises ValueError."""
    try:
        return {layer["name"]: layer["error"] for layer in events(folder)["layer"]}
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _broken(folder, error) from error


def events(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the log by kind.  Raises ValueError and OSError of a log that is none."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("start", "layer", "done")}
    for line in (folder / "log.jsonl").read_text("utf-8").splitlines():
        event = json.loads(line)
        found.setdefault(event["event"], []).append(event)
    return found


def _parameters(start: dict[str, Any], layers: Iterable[dict[str, Any]]) -> dict[str, int]:
    """What became of the model's parameters; {} in the logs of older versions."""
    if "parameters" not in start:
        return {}
    sizes = {True: 0, False: 0}
    for layer in layers:
        sizes[layer["grid"] == "keep"] += layer["weights"]
    total = start["parameters"]
    found = {
        "compressed": sizes[False],
        "kept": sizes[True],
        "skipped": total - sum(sizes.values()),
    }
    return {**found, "total": total}


def _phases(log: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Seconds and memory of the steps; nothing in the logs of older versions."""
    (found,) = log.get("phases", [{}])[-1:]
    return {key: value for key, value in found.items() if key != "event"}


def _broken(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    where = folder / "log.jsonl"
    return ValueError(f"no complete run log\n{where}: {reason}\ncompress the model again")


def _rows(layers: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each role and grid, in order of first appearance."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in layers:
        alike.setdefault((layer["role"], layer["grid"]), []).append(layer)
    return [
        Row(
            role=role,
            grid=grid,
            layers=len(held),
            bits=8 * sum(x["after"] for x in held) / sum(x["weights"] for x in held),
            error=sum(x["error"] for x in held) / len(held),
            before=sum(x["before"] for x in held),
            after=sum(x["after"] for x in held),
            fallbacks=sum(bool(x["counts"].get("fallbacks")) for x in held),
        )
        for (role, grid), held in alike.items()
    ]


def _blocks(layers: Iterable[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """Bits and mean error of each block, known by the first number in the names of its layers."""
    held: dict[int, list[dict[str, Any]]] = {}
    for layer in layers:
        number = block_of(layer["name"])
        if number is not None:
            held.setdefault(number, []).append(layer)
    for _, some in sorted(held.items()):
        weights = sum(x["weights"] for x in some)
        error = sum(x["error"] * x["weights"] for x in some) / weights
        yield 8 * sum(x["after"] for x in some) / weights, error


def block_of(name: str) -> int | None:
    """Number of the block that a layer is in, "model.layers.3.mlp.up_proj" -> 3."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return None if number is None else int(number[1])


def _merged(rows: list[Row]) -> Row:
    """Rows of one role as one."""
    layers = sum(row.layers for row in rows)
    weights = sum(8 * row.after / row.bits for row in rows)
    return Row(
        role=rows[0].role,
        grid=rows[0].grid if len(rows) == 1 else f"{len(rows)} grids",
        layers=layers,
        bits=8 * sum(row.after for row in rows) / weights,
        error=sum(row.error * row.layers for row in rows) / layers,
        before=sum(row.before for row in rows),
        after=sum(row.after for row in rows),
        fallbacks=sum(row.fallbacks for row in rows),
    )
