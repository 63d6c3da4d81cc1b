"""Outlook: what is known about compressing a model before it is done, for every budget."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from aptq.core.budget import Budget
from aptq.core.expected import expected_error
from aptq.core.grid import Grid
from aptq.core.plan import Plan, Target
from aptq.core.problem import code_bits
from aptq.core.scores import Scores
from aptq.effort import Effort, effort
from aptq.footprint import Running, running
from aptq.model.model import Model
from aptq.planner import Choice, Point
from aptq.planning import (
    Size,
    choose,
    grids,
    kept_names,
    planner,
    ragged,
    sizer,
    wants_scores,
)
from aptq.recipe import Recipe

ROWS = 16  # points of the front that a table shows


@dataclass(frozen=True)
class Line:
    """One budget: the plan, what it costs and what it takes."""

    budget: str
    choice: Choice
    running: Running | None  # None where it cannot be computed
    effort: Effort
    kept: dict[str, str]  # layers that stay 16 bit -> why

    @property
    def grids(self) -> dict[str, int]:
        """Layers of each target, the largest numbers first."""
        return dict(Counter(map(str, self.choice.plan.targets.values())).most_common())

    def to_json(self) -> dict[str, Any]:
        """The line as plain values."""
        memory = None
        if self.running is not None:
            memory = {**asdict(self.running), "peak": self.running.peak}
        return {
            "budget": self.budget,
            "bits": self.choice.bits,
            "nbytes": self.choice.nbytes,
            "loss": self.choice.loss,
            "noise": self.choice.noise,
            "bound": self.choice.bound,
            "slack": self.choice.slack,
            "next": None if self.choice.next is None else str(self.choice.next),
            "grids": self.grids,
            "kept": self.kept,
            "running": memory,
            "compressing": asdict(self.effort),
        }


@dataclass(frozen=True)
class Outlook:
    """All budgets of a model, and the best loss that is known for a size."""

    model: str
    bytes_before: int
    context: int
    unit: str  # of the losses of the front
    lines: tuple[Line, ...]
    front: tuple[Point, ...]
    notes: tuple[str, ...]

    def single(self) -> Line:
        """The only budget; ValueError if there are several."""
        if len(self.lines) > 1:
            raise ValueError(
                f"one file cannot hold {len(self.lines)} plans\n"
                f"budgets {', '.join(line.budget for line in self.lines)}\ngive one budget"
            )
        return self.lines[0]

    def to_json(self) -> dict[str, Any]:
        """The outlook as plain values."""
        return {
            "model": self.model,
            "bytes_before": self.bytes_before,
            "context": self.context,
            "unit": self.unit,
            "budgets": [line.to_json() for line in self.lines],
            "front": [point._asdict() for point in self.front],
            "notes": list(self.notes),
        }


def look(
    model: Model, recipe: Recipe, scores: Scores | None, context: int, device: torch.device
) -> Outlook:
    """The outlook for every budget of `recipe`; `device` is where it would be compressed.

    Without scores the plans are uniform.  Raises Infeasible for a budget that nothing fits.
    """
    notes: list[str] = []
    if scores is None and wants_scores(recipe, None):
        notes.append("no scores: plans are uniform here; make some with `aptq measure`")
    lines, size = [], sizer(model)
    for budget in recipe.budgets:
        single = replace(recipe, budget=budget)
        choice = choose(model, single, None, scores, size)
        if scores is not None:  # nothing will be measured
            single = replace(single, allocate=None)
        line, note = _line(model, single, choice, context, device)
        lines.append(line)
        notes += [note] if note else []
        notes += ragged(choice.plan, {**model.shapes, **model.outer_shapes})
    unit, front = _front(model, recipe, scores, size)
    whole = size(Plan.uniform(model.shapes, Grid("bf16"), keep=["*"]))
    return Outlook(
        model.source, whole, context, unit, tuple(lines), front, tuple(dict.fromkeys(notes))
    )


def _line(
    model: Model, recipe: Recipe, choice: Choice, context: int, device: torch.device
) -> tuple[Line, str]:
    """A budget's line, and a note where something of it is not known."""
    memory, note = None, ""
    wanted = Budget.parse(recipe.budget) if recipe.budget else Budget()
    try:
        memory = running(model, choice.plan, wanted.context or context, wanted.batch)
    except ValueError as error:  # a family whose memory cannot be computed can still be planned
        note = " ".join(str(error).splitlines()[:2])
    needs = effort(model, recipe, choice.plan, choice.nbytes, device)
    return Line(recipe.budget, choice, memory, needs, _sixteen(model, recipe, choice)), note


def _sixteen(model: Model, recipe: Recipe, choice: Choice) -> dict[str, str]:
    """Layers that stay 16 bit, and why."""
    found = dict(choice.kept)
    patterns = kept_names(model, recipe)
    for name in (*model.shapes, *model.outer_shapes):
        target = choice.plan.targets.get(name)
        if name in patterns:
            found.setdefault(name, f"keep pattern {patterns[name]!r}")
        elif target is None:
            found.setdefault(name, "outside the blocks (outer = true lets the plan choose)")
        elif code_bits(target) == 16:
            found.setdefault(name, "the budget allows it")
    return found


def _front(
    model: Model, recipe: Recipe, scores: Scores | None, size: Size
) -> tuple[str, tuple[Point, ...]]:
    """The unit and the plans that no smaller one equals, by size."""
    if scores is not None and recipe.allocate is not None:
        known = scores.unit == "nats" or scores.factor is not None
        unit = "nats per token" if known else f"relative damage ({scores.measure})"
        return unit, tuple(planner(model, recipe, scores, size).front(outer=recipe.outer))
    points = []
    for grid in grids(recipe):
        plan = Plan.uniform(model.shapes, grid, recipe.keep)
        bits = plan.bits(model.shapes, model.dtype.itemsize)
        points.append(Point(bits, size(plan), expected_error(grid, model.shapes), 0.0))
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.bits, one.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return "squared rounding error of normal weights", tuple(best)


def recorded(model: Model, recipe: Recipe, scores: Scores) -> dict[str, Any]:
    """For the log of a run: points of the front, and the bits of every candidate that fits all."""
    unit, front = _front(model, recipe, scores, sizer(model))
    shapes = {name: model.shapes[name] for name in scores.losses if name in model.shapes}
    bits = {
        text: Plan(dict.fromkeys(shapes, target)).bits(shapes, model.dtype.itemsize)
        for text, target in ((text, Target.parse(text)) for text in scores.candidates)
        if all(target.fits(shape) for shape in shapes.values())
    }
    return {"unit": unit, "points": [point[:4] for point in thinned(front, 64)], "bits": bits}


def thinned(points: Sequence[Point], most: int = ROWS) -> list[Point]:
    """At most so many of the points, at equal steps of size, the ends included."""
    if len(points) <= most:
        return list(points)
    low, high = points[0].bits, points[-1].bits
    wanted = [low + (high - low) * step / (most - 1) for step in range(most)]
    near = [min(points, key=lambda point: abs(point.bits - bits)) for bits in wanted]
    return list(dict.fromkeys(near))


def reasons(kept: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Reasons with the layers that they hold for, the most frequent first."""
    grouped: dict[str, list[str]] = {}
    for name, why in kept.items():
        grouped.setdefault(why, []).append(name)
    return sorted(grouped.items(), key=lambda item: -len(item[1]))
