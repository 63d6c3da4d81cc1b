"""Bounds and greedy choices for reduced problems: convex hulls, prices, and filling of slack."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from aptq.core.problem import Item, Reduced


class Relaxed(NamedTuple):
    """The relaxation in which a unit may take a mixture of two items."""

    bound: float  # no choice has a smaller loss
    prices: tuple[float, ...]  # loss that one unit of each row's room is worth
    chosen: tuple[int, ...]  # item positions; may exceed the room if there are several rows


class Step(NamedTuple):
    """From one corner of a unit's hull to the next."""

    worth: float  # loss saved for each unit of cost
    unit: int
    at: int  # the item that is reached


def steps(reduced: Reduced) -> list[Step]:
    """All hull steps of a problem with one row, the most worth first."""
    found: list[Step] = []
    for number, unit in enumerate(reduced.units):
        corners = _hull(unit)
        for before, after in pairwise(corners):
            found.append(Step(_worth(unit[before], unit[after]), number, after))
    return sorted(found, key=lambda step: (-step.worth, step.unit, step.at))


def relax(reduced: Reduced) -> Relaxed:
    """The best mixture: by sorted hull steps for one row, by a linear program for several."""
    if len(reduced.room) > 1:
        prices = _prices(reduced)
        chosen = tuple(_cheapest(unit, prices) for unit in reduced.units)
        return Relaxed(lagrangian(reduced, prices), prices, chosen)
    at, spent, price = [0] * len(reduced.units), 0.0, 0.0
    for step in steps(reduced) if reduced.room else ():
        unit = reduced.units[step.unit]
        spent += unit[step.at].cost[0] - unit[at[step.unit]].cost[0]
        if spent > reduced.room[0]:
            price = step.worth
            break
        at[step.unit] = step.at
    prices = (price,) * len(reduced.room)
    return Relaxed(lagrangian(reduced, prices), prices, tuple(at))


def lagrangian(reduced: Reduced, prices: Sequence[float]) -> float:
    """Lower bound of the loss that any prices >= 0 prove."""
    least = math.fsum(min(_priced(item, prices) for item in unit) for unit in reduced.units)
    return least - math.fsum(map(math.prod, zip(prices, reduced.room, strict=True)))


def greedy(reduced: Reduced, relaxed: Relaxed) -> tuple[int, ...] | None:
    """Round the relaxation down and spend the slack; None if no choice within the room was found.

    With one row: loss <= bound + the loss that one hull step saves.
    """
    chosen = _repair(reduced, relaxed.chosen)
    return None if chosen is None else fill(reduced, chosen)


def fill(reduced: Reduced, chosen: Sequence[int]) -> tuple[int, ...]:
    """Raise units while there is room, the move that saves most for its share of the slack first.

    Afterwards no single unit can be improved within the room.
    """
    at = list(chosen)
    slack = [room - cost for room, cost in zip(reduced.room, reduced.cost(at), strict=True)]
    while True:
        moved: set[int] = set()
        for _, number, to in sorted(_moves(reduced, at, slack)):
            if number in moved:
                continue
            more = _difference(reduced.units[number], at[number], to)
            if all(m <= s for m, s in zip(more, slack, strict=True)):
                at[number] = to
                slack = [s - m for s, m in zip(slack, more, strict=True)]
                moved.add(number)
        if not moved:
            return tuple(at)
        slack = [room - cost for room, cost in zip(reduced.room, reduced.cost(at), strict=True)]


def trim(reduced: Reduced, prices: Sequence[float], upper: float) -> Reduced:
    """Without items that are in no choice better than `upper`, as the prices prove."""
    gap = upper - lagrangian(reduced, prices) + 1e-9 * abs(upper)
    units = []
    for unit in reduced.units:
        least = min(_priced(item, prices) for item in unit)
        units.append(tuple(item for item in unit if _priced(item, prices) - least <= gap))
    return Reduced(tuple(units), reduced.room, reduced.rows)


def _priced(item: Item, prices: Sequence[float]) -> float:
    return item.loss + sum(map(math.prod, zip(prices, item.cost, strict=True)))


def _cheapest(unit: Sequence[Item], prices: Sequence[float]) -> int:
    return min(range(len(unit)), key=lambda at: (_priced(unit[at], prices), unit[at].cost))


def _worth(before: Item, after: Item) -> float:
    return (before.loss - after.loss) / (after.cost[0] - before.cost[0])


def _hull(unit: Sequence[Item]) -> list[int]:
    """Positions on the lower convex hull of (cost, loss); items come by rising cost."""
    corners: list[int] = []
    for at, item in enumerate(unit):
        while len(corners) > 1:
            last = unit[corners[-1]]
            if _worth(unit[corners[-2]], last) > _worth(last, item):
                break
            corners.pop()
        corners.append(at)
    return corners


def _difference(unit: Sequence[Item], at: int, to: int) -> list[float]:
    return [new - old for new, old in zip(unit[to].cost, unit[at].cost, strict=True)]


def _moves(
    reduced: Reduced, at: Sequence[int], slack: Sequence[float]
) -> Iterator[tuple[float, int, int]]:
    """(cost in shares of the slack for each saved loss, unit, item) of all moves that fit alone."""
    for number, unit in enumerate(reduced.units):
        for to, item in enumerate(unit):
            gain = unit[at[number]].loss - item.loss
            more = _difference(unit, at[number], to)
            if gain > 0 and all(m <= s for m, s in zip(more, slack, strict=True)):
                shares = (max(m, 0.0) / s for m, s in zip(more, slack, strict=True) if s)
                yield sum(shares) / gain, number, to


def _repair(reduced: Reduced, chosen: Sequence[int]) -> tuple[int, ...] | None:
    """The choice made to fit, by moves that lose least for what they free."""
    at = list(chosen)

    def over(cost: Sequence[float]) -> float:
        pairs = zip(cost, reduced.room, strict=True)
        return sum(max(c - room, 0.0) / max(room, 1.0) for c, room in pairs)

    while not reduced.fits(at):
        cost = reduced.cost(at)
        best: tuple[float, int, int] | None = None
        for number, unit in enumerate(reduced.units):
            for to, item in enumerate(unit):
                more = _difference(unit, at[number], to)
                freed = over(cost) - over([c + m for c, m in zip(cost, more, strict=True)])
                if freed > 1e-15:
                    move = ((item.loss - unit[at[number]].loss) / freed, number, to)
                    best = move if best is None else min(best, move)
        if best is None:
            return None
        at[best[1]] = best[2]
    return tuple(at)


def _prices(reduced: Reduced) -> tuple[float, ...]:
    """Duals of the linear program over mixtures, by HiGHS (deterministic)."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    flat = [(number, item) for number, unit in enumerate(reduced.units) for item in unit]
    scale = max(abs(item.loss) for _, item in flat) or 1.0
    wide = [room or 1.0 for room in reduced.room]
    rows = np.array([[c / w for c, w in zip(i.cost, wide, strict=True)] for _, i in flat]).T
    owner = (np.ones(len(flat)), ([number for number, _ in flat], np.arange(len(flat))))
    found = linprog(
        np.array([item.loss / scale for _, item in flat]),
        A_ub=csr_array(rows),
        b_ub=np.array([room / w for room, w in zip(reduced.room, wide, strict=True)]),
        A_eq=csr_array(owner, shape=(len(reduced.units), len(flat))),
        b_eq=np.ones(len(reduced.units)),
        method="highs",
    )
    if found.ineqlin.marginals is None:  # no mixture fits: any prices prove a bound
        return (0.0,) * len(reduced.room)
    pairs = zip(found.ineqlin.marginals, wide, strict=True)
    return tuple(max(0.0, -float(dual)) * scale / w for dual, w in pairs)
