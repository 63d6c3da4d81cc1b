"""Problem: which option every unit of layers takes, so that the damage is least within limits.

A multiple-choice knapsack: minimise sum_u loss[u, c_u] subject to sum_u cost_r[u, c_u] <= limit_r
(with a floor: minimise sum_u cost_0 subject to sum_u loss <= floor and the other limits).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aptq.core.plan import Target
from aptq.failures import Infeasible


@dataclass(frozen=True, slots=True)
class Option:
    """What one choice makes of a unit."""

    target: Target
    cost: tuple[int, ...]  # bytes of every resource
    loss: float  # as measured: may be negative
    noise: float = 0.0  # its standard error; 0 where unknown

    @property
    def damage(self) -> float:
        """The loss that counts: measuring noise that looks like a gain is none."""
        return max(self.loss, 0.0)


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that share one choice."""

    layers: tuple[str, ...]
    options: tuple[Option, ...]
    weights: int
    outer: bool = False  # embedding or head: in no mean of bits


@dataclass(frozen=True, slots=True)
class Solution:
    """One option for each unit."""

    chosen: tuple[int, ...]  # option number of every unit
    loss: float  # sum of damages
    cost: tuple[int, ...]
    bound: float | None  # proven lower bound of what was minimised: loss, or cost[0] with a floor


class Item(NamedTuple):
    """An option that may be chosen; in a problem with a floor, loss and cost[0] change places."""

    option: int  # its number
    cost: tuple[float, ...]  # above the unit's least cost, of every row that can bind; exact
    loss: float  # what is minimised


@dataclass(frozen=True, slots=True)
class Reduced:
    """The part of a problem that is left to decide.

    No item is dominated, none alone exceeds the room, and a row is left out where no choice breaks
    it or where another row implies it.
    """

    units: tuple[tuple[Item, ...], ...]
    room: tuple[float, ...]  # what the choices may cost together
    rows: tuple[int, ...]  # the resource of every row; 0 stands for the loss if there is a floor

    def loss(self, chosen: Sequence[int]) -> float:
        """Sum of losses of items chosen by position, correctly rounded."""
        return math.fsum(unit[at].loss for unit, at in zip(self.units, chosen, strict=True))

    def cost(self, chosen: Sequence[int]) -> list[float]:
        """Cost of items chosen by position; integers are exact."""
        picked = [unit[at].cost for unit, at in zip(self.units, chosen, strict=True)]
        return [math.fsum(cost[row] for cost in picked) for row in range(len(self.room))]

    def fits(self, chosen: Sequence[int]) -> bool:
        """True if no row is exceeded, not even by one byte."""
        return all(c <= room for c, room in zip(self.cost(chosen), self.room, strict=True))


@dataclass(frozen=True, slots=True)
class Problem:
    """Units, what every resource may cost, and what shall be least."""

    units: tuple[Unit, ...]
    limits: tuple[int, ...]
    floor: float | None = None  # quality floor: the least cost[0] with a loss not above it
    code_bits: float | None = None  # mean code bits, where an allocator reads a budget so

    def solution(self, chosen: Sequence[int], bound: float | None = None) -> Solution:
        """The solution that takes option chosen[u] of unit u.

        Raises Infeasible if it breaks a limit: solvers see to all others, this is the limit on
        cost[0] beside a floor.
        """
        picked = [unit.options[at] for unit, at in zip(self.units, chosen, strict=True)]
        cost = tuple(sum(o.cost[row] for o in picked) for row in range(len(self.limits)))
        for row, limit in enumerate(self.limits):
            if cost[row] > limit:
                raise _unreachable(f"cost {row}", limit, cost[row])
        loss = math.fsum(option.damage for option in picked)
        return Solution(tuple(chosen), loss, cost, bound)

    def unfold(self, reduced: Reduced, at: Sequence[int], bound: float | None) -> Solution:
        """The solution that takes item at[u] of the reduced unit u."""
        pairs = zip(reduced.units, at, strict=True)
        return self.solution([unit[position].option for unit, position in pairs], bound)

    def reduced(self) -> Reduced:
        """What is left to decide.  Raises Infeasible if a limit is below the least cost."""
        table = [[self._entry(option) for option in unit.options] for unit in self.units]
        limits = self.limits if self.floor is None else (self.floor, *self.limits[1:])
        room: list[float] = []
        for row, limit in enumerate(limits):
            least = [min(cost[row] for cost, _ in unit) for unit in table]
            floor_row = self.floor is not None and row == 0
            # the sum of losses that just meets the floor must not fail by its last digits
            spare = limit * (1 + 1e-12) - math.fsum(least)
            room.append(spare if floor_row else limit - sum(map(int, least)))
            if room[row] < 0:
                name = "the loss" if floor_row else f"cost {row}"
                raise _unreachable(name, limit, math.fsum(least))
            for unit, minimum in zip(table, least, strict=True):
                for at, (cost, loss) in enumerate(unit):
                    above = (*cost[:row], cost[row] - minimum, *cost[row + 1 :])
                    unit[at] = (above, loss)
        rows = _binding(table, room)
        kept = tuple(room[row] for row in rows)
        units = []
        for source, unit in zip(self.units, table, strict=True):
            items = [
                (Item(at, tuple(cost[row] for row in rows), loss), sum(source.options[at].cost))
                for at, (cost, loss) in enumerate(unit)
            ]
            units.append(_undominated(items, kept))
        return Reduced(tuple(units), kept, rows)

    def everything(self, row: int) -> Reduced:
        """All that may be chosen with cost[row] as the only row, and room for all of it."""
        units = []
        for unit in self.units:
            least = min(option.cost[row] for option in unit.options)
            items = [
                (Item(at, (option.cost[row] - least,), option.damage), sum(option.cost))
                for at, option in enumerate(unit.options)
            ]
            units.append(_undominated(items, (math.inf,)))
        return Reduced(tuple(units), (math.inf,), (row,))

    def _entry(self, option: Option) -> tuple[tuple[float, ...], float]:
        if self.floor is None:
            return option.cost, option.damage
        return (option.damage, *option.cost[1:]), option.cost[0]


def significant(options: Sequence[Option], factor: float) -> tuple[Option, ...]:
    """Options without those whose gain is lost in the noise.

    By rising cost[0], an option stays if its damage is lower than that of the last one that stayed
    by more than `factor` times the larger of their noises (factor < 0: all stay).  One that stores
    16 bits always stays, so that a budget above everything leaves the model as it is.
    """
    found: list[Option] = []
    for option in sorted(options, key=lambda one: (one.cost[0], one.damage)):
        if found:
            last = found[-1]
            gain, noise = last.damage - option.damage, max(last.noise, option.noise)
            if factor >= 0 and gain <= factor * noise and code_bits(option.target) < 16:
                continue
        found.append(option)
    return tuple(found)


def code_bits(target: Target) -> int:
    """Bits of the codes of one weight, scales not counted; 16 for a kept layer."""
    return target.bits


def _binding(
    table: Sequence[Sequence[tuple[tuple[float, ...], float]]], room: Sequence[float]
) -> tuple[int, ...]:
    """Rows that some choice can break and that no other row implies."""
    most = [math.fsum(max(c[row] for c, _ in unit) for unit in table) for row in range(len(room))]
    rows = [row for row in range(len(room)) if most[row] > room[row]]
    costs = [cost for unit in table for cost, _ in unit]

    def implied(row: int, by: int) -> bool:
        weaker = all(cost[row] <= cost[by] for cost in costs) and room[row] >= room[by]
        stronger = all(cost[by] <= cost[row] for cost in costs) and room[by] >= room[row]
        return weaker and (not stronger or by < row)  # of two equal rows the first remains

    return tuple(row for row in rows if not any(implied(row, by) for by in rows if by != row))


def _undominated(items: Sequence[tuple[Item, int]], room: tuple[float, ...]) -> tuple[Item, ...]:
    """Items by rising cost, without those that another one beats or equals in everything.

    Beside every item stands its whole cost, which decides between equals.
    """
    found: list[Item] = []
    for item, _ in sorted(items, key=lambda pair: (pair[0].cost, pair[0].loss, pair[1])):
        fits = all(c <= limit for c, limit in zip(item.cost, room, strict=True))
        beaten = any(
            other.loss <= item.loss
            and all(a <= b for a, b in zip(other.cost, item.cost, strict=True))
            for other in reversed(found)
        )
        if fits and not beaten:
            found.append(item)
    if not found:
        tightest = min(item.cost for item, _ in items)
        raise _unreachable("a unit's costs together", room[0], tightest[0])
    return tuple(found)


def _unreachable(what: str, limit: float, least: float) -> Infeasible:
    return Infeasible(
        f"no choice fits\n{what} may be {limit:,.10g}, the least that can be reached is "
        f"{least:,.10g}\nraise the budget, allow smaller grids, or keep fewer layers"
    )
