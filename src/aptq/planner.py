"""Planner: which grid every layer gets so that the model keeps within a budget, to the byte."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from aptq.allocate import Allocator
from aptq.core.budget import Budget
from aptq.core.expected import expected_error
from aptq.core.grid import Grid
from aptq.core.hull import steps
from aptq.core.plan import Candidate, Plan, Shapes, Target
from aptq.core.problem import Problem, Unit, code_bits
from aptq.core.scores import Scores
from aptq.core.search import Room, Search
from aptq.core.units import Wishes
from aptq.failures import Infeasible

CANDIDATES: tuple[Grid, ...] = (
    *(
        Grid.parse(f"int{bits}-{group}-z")
        for bits in range(2, 9)
        for group in ("row", "g128", "g64", "g32")
    ),
    Grid("bf16"),  # taken by a budget above everything else: nothing is lost then
)

Device = Callable[[Budget], Room]  # what "fits ..." leaves for the weights, and how to weigh them


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan and what it takes."""

    plan: Plan
    grid: Candidate | None  # None: not one for all layers
    bits: float  # bits per weight of the linears in the blocks
    nbytes: int  # all files of the checkpoint
    loss: float | None = None  # expected, nats per token; None where the scores cannot tell
    noise: float | None = None  # its standard error
    bound: float | None = None  # nats: no plan of these candidates within the limits loses less
    slack: int | None = None  # bytes left under the tightest limit
    step: int | None = None  # bytes of the smallest change that would lose less; None: no such
    next: Budget | None = None  # a budget with room for that change, its headers not counted
    kept: Mapping[str, str] = field(default_factory=dict)  # layers at 16 bits and why


class Point(NamedTuple):
    """A plan of the Pareto front."""

    bits: float
    nbytes: int  # exact tensors, interpolated headers
    loss: float  # nats per token if the scores can tell, else in their own unit
    noise: float


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Chooses by scores; `size`: bytes of a plan's checkpoint, called a few times a budget."""

    wishes: Wishes
    scores: Scores
    allocator: Allocator
    size: Callable[[Plan], int]
    device: Device | None = None

    def choose(self, budget: str) -> Choice:
        """The plan for one budget, never above it.

        Raises Infeasible, with what can be reached and what takes the most of it; ValueError for a
        bad budget or pattern, and for a floor in nats where the scores know none.
        """
        wanted = Budget.parse(budget)
        codes = wanted.bpw if self.allocator.reads_codes else None
        linear = None if codes is not None else wanted.linear_bytes(self._weights)
        rooms = _rooms(wanted, self.size, self.device)
        # Bits per weight do not count what lies outside the blocks: then it stays as it is.
        units = self._units(outer=wanted.loss is not None or bool(rooms))
        most = [sum(max(o.cost[row] for o in unit.options) for unit in units) for row in (0, 1)]
        limits = (most[0], most[1] if linear is None else linear)
        problem = Problem(units, limits, self._floor(wanted), codes)
        made_by = {
            "rule": type(self.allocator).__name__.lower(),
            "measure": self.scores.measure,
            "budget": budget.strip(),
        }
        search = Search(problem, rooms, linear, self.allocator.solve, made_by)
        search.refuse(budget, self._weights)
        chosen, bound = search.run()
        return self._choice(search, chosen, None if wanted.loss else bound, wanted)

    def front(self, *, outer: bool = True) -> list[Point]:
        """Corners of the front of size against loss, by rising size; outer: as in a byte budget."""
        units = self._units(outer)
        problem = Problem(units, (0, 0))
        reduced = problem.everything(0)
        search = Search(problem, (), None, self.allocator.solve, {})
        at = [unit[0].option for unit in reduced.units]
        (nbytes, linear), first = search.cost(at), self.size(search.plan(at))
        picked = [unit.options[index] for unit, index in zip(units, at, strict=True)]
        loss, square = sum(o.damage for o in picked), sum(o.noise**2 for o in picked)
        path = [(nbytes, linear, loss, square)]
        for step in steps(reduced):
            options, old = units[step.unit].options, at[step.unit]
            at[step.unit] = new = reduced.units[step.unit][step.at].option
            nbytes += options[new].cost[0] - options[old].cost[0]
            linear += options[new].cost[1] - options[old].cost[1]
            loss += options[new].damage - options[old].damage
            square += options[new].noise ** 2 - options[old].noise ** 2
            left = loss if loss > 1e-12 * path[0][2] else 0.0  # below: what subtracting leaves
            path.append((nbytes, linear, left, max(square, 0.0)))
        headers = first - path[0][0]
        more = (self.size(search.plan(at)) - nbytes - headers) / max(1, len(path) - 1)
        unit = self._nats or 1.0
        return [
            Point(
                8 * b / self._weights, a + headers + round(more * n), unit * c, unit * math.sqrt(d)
            )
            for n, (a, b, c, d) in enumerate(path)
        ]

    @property
    def _weights(self) -> int:
        return sum(math.prod(shape) for shape in self.wishes.shapes.values())

    @property
    def _nats(self) -> float | None:
        """Nats per token that one unit of the scores stands for."""
        known = self.scores.unit == "nats" and self.scores.factor is None
        return 1.0 if known else self.scores.factor

    def _units(self, outer: bool) -> tuple[Unit, ...]:
        wishes = replace(self.wishes, significance=-1) if self.allocator.ranks else self.wishes
        return tuple(unit for unit in wishes.units(self.scores) if outer or not unit.outer)

    def _floor(self, wanted: Budget) -> float | None:
        if wanted.loss is None:
            return None
        if self._nats is None:
            raise ValueError(
                f"no plan can be made for {wanted}\nmeasure {self.scores.measure!r} has no "
                "unit, it only orders\nuse a measure in nats, or have its factor fitted"
            )
        return wanted.loss / self._nats

    def _choice(
        self, search: Search, chosen: Sequence[int], bound: float | None, wanted: Budget
    ) -> Choice:
        plan, left = search.plan(chosen), search.left(chosen)
        loss, noise = self.scores.nats(plan) or (None, None)
        return Choice(
            plan,
            None,
            8 * search.cost(chosen)[1] / self._weights,
            self.size(plan),
            loss,
            noise,
            None if bound is None or self._nats is None else bound * self._nats,
            min(left, default=None),
            search.step(chosen),
            None if wanted.loss else self._next(wanted, search, chosen),
            self._kept(plan),
        )

    def _next(self, wanted: Budget, search: Search, chosen: Sequence[int]) -> Budget | None:
        """The budget raised by what the smallest useful change lacks; None if it has room."""
        step = search.step(chosen)
        missing = [0 if step is None else max(0, step - left) for left in search.left(chosen)]
        if not any(missing):
            return None
        found = wanted
        if search.linear is not None:
            bits = 8 * (search.linear + missing.pop()) / self._weights
            found = replace(found, bpw=math.ceil(bits * 1e4) / 1e4)
        if wanted.device_bytes is not None:
            found = replace(found, device_bytes=wanted.device_bytes + missing.pop())
        if wanted.nbytes is not None:
            found = replace(found, nbytes=wanted.nbytes + missing.pop())
        return found

    def _kept(self, plan: Plan) -> dict[str, str]:
        """Every layer that has 16 bits under `plan`, and the reason."""
        found = self.wishes.kept(self.scores)
        for name in self.wishes.outer.keys() - plan.targets.keys():
            found.setdefault(name, "does not count in bits per weight, or is best so")
        for name, target in plan.targets.items():
            if code_bits(target) == 16:
                found.setdefault(name, "the best use of the budget")
        return found


def uniform(
    shapes: Shapes,
    grids: Sequence[Candidate],
    budget: str,
    *,
    keep: Sequence[str] = (),
    itemsize: int = 2,
    size: Callable[[Plan], int],
    device: Device | None = None,
) -> Choice:
    """The best of `grids` (CANDIDATES if empty) not above `budget`, the same for all layers.

    budget "" asks for exactly one grid and takes it.  `size` gives the bytes of a plan's
    checkpoint, `itemsize` is the source's bytes per weight.  Raises Infeasible, with what could be
    reached, if every grid is above the budget; ValueError for a bad budget or keep pattern.
    """
    if not budget and len(grids) != 1:
        raise ValueError(
            f"neither a grid nor a budget\nthe recipe has {len(grids)} grids and no budget\n"
            "give --grid int4-g64-z or --budget 4bpw"
        )

    known: Sequence[Candidate] = grids or CANDIDATES
    plans = {grid: Plan.uniform(shapes, grid, keep) for grid in known}

    def choice(grid: Candidate) -> Choice:
        return Choice(plans[grid], grid, plans[grid].bits(shapes, itemsize), size(plans[grid]))

    if not budget:
        return choice(grids[0])
    limit = Budget.parse(budget)
    if limit.loss is not None:
        raise ValueError(
            f"no plan can be made for {budget}\none grid for all layers has no expected loss\n"
            "give scores and an allocator, or a size"
        )
    rooms = _rooms(limit, size, device)
    stored = {grid: plan.nbytes(shapes, itemsize) for grid, plan in plans.items()}
    # ties (equal expected error) go to the smaller plan
    for grid in sorted(plans, key=lambda grid: (expected_error(grid, shapes), stored[grid])):
        slim = limit.bpw is None or plans[grid].bits(shapes, itemsize) <= limit.bpw
        if slim and all(room.size(plans[grid]) <= room.limit for room in rooms):
            return choice(grid)
    extremes = [choice(extreme(plans, key=stored.__getitem__)) for extreme in (min, max)]
    kept = [shapes[x] for x, target in extremes[0].plan.targets.items() if target.kept]
    raise _none_fits(budget, extremes, sum(Target().nbytes(shape, itemsize) for shape in kept))


def _none_fits(budget: str, extremes: Sequence[Choice], kept: int) -> Infeasible:
    """extremes: the smallest and the largest choice; kept: bytes of layers that stay."""
    least, most = extremes
    return Infeasible(
        f"no grid fits the budget {budget}\n"
        f"smallest {least.grid}: {least.bits:.4g} bpw, {least.nbytes:,} bytes; "
        f"largest {most.grid}: {most.bits:.4g} bpw, {most.nbytes:,} bytes; "
        f"kept layers: {kept:,} bytes\n"
        f"raise the budget, allow smaller grids, or keep fewer layers"
    )


def _rooms(wanted: Budget, size: Callable[[Plan], int], device: Device | None) -> tuple[Room, ...]:
    """Limits on measured sizes: of the checkpoint, then of a device."""
    rooms = [] if wanted.nbytes is None else [Room(wanted.nbytes, size)]
    if wanted.device_bytes is not None:
        if device is None:
            raise ValueError(
                f"no plan can be made for {wanted}\nnothing here knows what a device needs\n"
                "give bits per weight or a size of the checkpoint"
            )
        rooms.append(device(wanted))
    return tuple(rooms)
