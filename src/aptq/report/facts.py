"""Everything a report shows of one run, read from its folder: layers, curves, depth, phases."""

import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aptq.report.summary import Summary, block_of, events, read

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One linear.  `block` is None outside the blocks; `score` in the unit of the scores."""

    name: str
    block: int | None
    role: str
    grid: str
    weights: int
    bits: float  # stored bits per weight
    error: float  # |W - Q|^2 / |W|^2
    score: float | None  # the loss that was predicted for what was chosen
    damping: float | None  # share of the mean diagonal of H that was added
    counts: dict[str, float]

    @property
    def group(self) -> str:
        """Columns that share a scale, in words."""
        found = re.search(r"-(?:g(\d+)|(row))", self.grid)
        if found is None:
            return "none" if self.grid in ("keep", "bf16") else "of its type"
        return f"{found[1]} columns" if found[1] else "a row"


@dataclass(frozen=True, slots=True)
class Facts:
    """A run, read once.  Lists are empty where an older version did not record something."""

    folder: Path
    summary: Summary
    start: Event
    cells: tuple[Cell, ...]
    recipe: str
    settings: dict[str, Any]  # the recipe, parsed
    scores: dict[str, Any] | None
    front: Event | None  # unit, points [bits, bytes, loss, noise], bits of the candidates
    stages: tuple[Event, ...]
    tuned: tuple[Event, ...]
    blocks: tuple[Event, ...]

    @property
    def name(self) -> str:
        """The last part of where the model came from."""
        return Path(self.summary.source).name or self.summary.source

    @property
    def unit(self) -> str:
        """Of the scores."""
        return "nats per token" if (self.scores or {}).get("unit") == "nats" else "relative damage"

    def inside(self) -> list[Cell]:
        """Linears in the blocks."""
        return [cell for cell in self.cells if cell.block is not None]


def collect(folder: Path) -> Facts:
    """The facts of the run in `folder`.  Raises ValueError, as summary.read does."""
    summary, found = read(folder), events(folder)
    recipe, table = (folder / "recipe.toml").read_text("utf-8"), folder / "scores.json"
    scores = json.loads(table.read_text("utf-8")) if table.is_file() else None
    return Facts(
        folder=folder,
        summary=summary,
        start=found["start"][0],
        cells=tuple(_cell(layer, scores) for layer in found["layer"]),
        recipe=recipe,
        settings=tomllib.loads(recipe),
        scores=scores,
        front=found.get("front", [None])[-1],
        stages=tuple(found.get("stage", ())),
        tuned=tuple(event for event in found.get("tuned", ()) if "start" in event),
        blocks=tuple(found.get("block", ())),
    )


def _cell(layer: Event, scores: dict[str, Any] | None) -> Cell:
    name, grid = layer["name"], layer["grid"]
    score = None
    if scores is not None and name in scores["losses"] and grid in scores["candidates"]:
        score = scores["losses"][name][scores["candidates"].index(grid)]
    return Cell(
        name=name,
        block=block_of(name),
        role=layer["role"],
        grid=grid,
        weights=layer["weights"],
        bits=8 * layer["after"] / layer["weights"],
        error=layer["error"],
        score=score,
        damping=layer.get("damping"),
        counts=layer["counts"],
    )


def mean_bits(cells: Sequence[Cell]) -> float:
    """Stored bits per weight of some linears together."""
    return sum(x.bits * x.weights for x in cells) / sum(x.weights for x in cells)


def mean_error(cells: Sequence[Cell]) -> float:
    """Relative squared errors, averaged over the weights."""
    return sum(x.error * x.weights for x in cells) / sum(x.weights for x in cells)


def by_block(cells: Iterable[Cell]) -> dict[int, list[Cell]]:
    """Linears of each block, in the order of the blocks."""
    found: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.block is not None:
            found.setdefault(cell.block, []).append(cell)
    return dict(sorted(found.items()))


def curves(facts: Facts) -> dict[str, list[tuple[float, float]]]:
    """Predicted loss of all layers of a role at every candidate: role -> [(bits, loss)]."""
    bits = (facts.front or {}).get("bits", {})
    if facts.scores is None or not bits:
        return {}
    roles = {cell.name: cell.role for cell in facts.cells}
    found: dict[str, list[tuple[float, float]]] = {}
    for number, text in enumerate(facts.scores["candidates"]):
        sums: dict[str, float] = {}
        for name, losses in facts.scores["losses"].items():
            if name in roles:
                role = roles[name]
                sums[role] = sums.get(role, 0.0) + max(losses[number], 0.0)
        for role, loss in sums.items():
            if text in bits and loss > 0:
                found.setdefault(role, []).append((bits[text], loss))
    return {role: _lower(points) for role, points in found.items()}


def _lower(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Only candidates that no smaller one equals, by size."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept
