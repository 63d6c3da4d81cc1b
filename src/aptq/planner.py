"""Which uniform plan a budget allows: of the grids not above it, that of least expected error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from aptq.core.grid import Grid
from aptq.core.plan import Budget, Plan, Shapes
from aptq.failures import Infeasible

CANDIDATES: tuple[Grid, ...] = (
    *(
        Grid.parse(f"int{bits}-{group}-z")
        for bits in range(2, 9)
        for group in ("row", "g128", "g64", "g32")
    ),
    Grid("bf16"),  # taken by a budget above everything else: nothing is lost then
)


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan and what it takes."""

    plan: Plan
    grid: Grid | None  # None: the plan was given
    bits: float  # bits per weight of the linears in the blocks
    nbytes: int  # all files of the checkpoint


def uniform(
    shapes: Shapes,
    grids: Sequence[Grid],
    budget: str,
    *,
    keep: Sequence[str] = (),
    itemsize: int = 2,
    size: Callable[[Plan], int],
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

    def choice(grid: Grid) -> Choice:
        plan = Plan.uniform(shapes, grid, keep)
        return Choice(plan, grid, plan.bits(shapes, itemsize), size(plan))

    if not budget:
        return choice(grids[0])
    limit = Budget.parse(budget)
    choices = {grid: choice(grid) for grid in grids or CANDIDATES}
    fitting = {grid: one for grid, one in choices.items() if _fits(one, limit)}
    if not fitting:
        raise _infeasible(list(choices.values()), budget, limit)
    # ties (equal expected error) go to the smaller plan
    best = min(fitting, key=lambda grid: (expected_error(grid, shapes), fitting[grid].nbytes))
    return fitting[best]


def expected_error(grid: Grid, shapes: Shapes) -> float:
    """Mean squared rounding error of standard normal weights, averaged over the layers.

    A step of width s rounds with error s^2 / 12; s is the expected range of a group's weights over
    its number of steps.
    """
    if grid.dense:
        return 0.0
    total = sum(out * columns for out, columns in shapes.values())
    lost = 0.0
    for out, columns in shapes.values():
        group = min(grid.group or columns, columns)
        if grid.zero == "none":  # full range: the extreme weight takes the lowest of 2^bits levels
            step = 2 * _extreme(2 * group) / grid.levels
        else:
            step = 2 * _extreme(group) / (grid.levels - 1)
        lost += out * columns * step**2 / 12
    return lost / total


def _extreme(count: int) -> float:
    """Expected largest of `count` standard normal numbers (Blom's approximation)."""
    return max(NormalDist().inv_cdf((count - 0.375) / (count + 0.25)), 0.5)


def _fits(choice: Choice, limit: Budget) -> bool:
    bits = math.inf if limit.bpw is None else limit.bpw
    nbytes = math.inf if limit.nbytes is None else limit.nbytes
    return choice.bits <= bits and choice.nbytes <= nbytes


def _infeasible(choices: Sequence[Choice], budget: str, limit: Budget) -> Infeasible:
    least = min(choices, key=lambda one: one.nbytes if limit.bpw is None else one.bits)
    most = max(choices, key=lambda one: one.bits)
    return Infeasible(
        f"no grid fits the budget {budget}\n"
        f"smallest {least.grid}: {least.bits:.4g} bpw, {least.nbytes:,} bytes; "
        f"largest {most.grid}: {most.bits:.4g} bpw, {most.nbytes:,} bytes\n"
        f"raise the budget, allow smaller grids, or keep fewer layers"
    )
