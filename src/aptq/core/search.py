"""Search: solve, measure the true size of the plan, correct the limit and solve again.

Tensors add up; headers and lists of a checkpoint do not, and only `Room.size` knows them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from aptq.core.plan import Plan, Target
from aptq.core.problem import Problem, Solution, code_bits
from aptq.failures import Infeasible

ROUNDS = 6  # the second usually ends it


class Room(NamedTuple):
    """A limit on what `size` says of a plan, in bytes."""

    limit: int
    size: Callable[[Plan], int]


@dataclass(frozen=True)
class Search:
    """Costs of the problem are (bytes of tensors, those of them inside the blocks)."""

    problem: Problem
    rooms: tuple[Room, ...]
    linear: int | None  # limit of cost[1]
    solver: Callable[[Problem], Solution]
    made_by: Mapping[str, str]
    _known: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def run(self) -> tuple[tuple[int, ...], float | None]:
        """The best choice that was found within all limits, and a bound of its loss.

        Takes 16 bits everywhere if that fits.  Raises Infeasible as the solver does.
        """
        whole = self._whole()
        if whole is not None:
            return whole, 0.0
        best: Solution | None = None
        cheapest = self.cheapest()
        overhead = self._overhead(cheapest)
        for number in range(ROUNDS):
            spare = (r.limit - extra for r, extra in zip(self.rooms, overhead, strict=True))
            limit = min(spare, default=self.problem.limits[0])
            limits = (max(limit, self.cost(cheapest)[0]), self.problem.limits[1])
            found = self.solver(replace(self.problem, limits=limits))
            left, real = min(self.left(found.chosen), default=0), self._overhead(found.chosen)
            if left >= 0 and (best is None or found.loss < best.loss):
                best = found
            step = self.step(found.chosen)
            known = all(new >= old for new, old in zip(real, overhead, strict=True))
            if left >= 0 and (known or step is None or left < step):
                break
            worse = [max(pair) + 64 * number for pair in zip(real, overhead, strict=True)]
            overhead = real if left >= 0 else worse
        return (cheapest, None) if best is None else (best.chosen, best.bound)

    def cheapest(self) -> tuple[int, ...]:
        """The option of least cost everywhere."""
        return tuple(
            min(range(len(unit.options)), key=lambda at: unit.options[at].cost)
            for unit in self.problem.units
        )

    def plan(self, chosen: Sequence[int]) -> Plan:
        """The plan of a choice; embedding and head are named only if they change."""
        targets: dict[str, Target] = {}
        for unit, at in zip(self.problem.units, chosen, strict=True):
            target = unit.options[at].target
            if not (unit.outer and target.kept):
                targets |= dict.fromkeys(unit.layers, target)
        return Plan(targets, dict(self.made_by))

    def cost(self, chosen: Sequence[int]) -> tuple[int, int]:
        """Bytes of tensors: all that the units hold, and those inside the blocks."""
        picked = [u.options[at].cost for u, at in zip(self.problem.units, chosen, strict=True)]
        return sum(cost[0] for cost in picked), sum(cost[1] for cost in picked)

    def left(self, chosen: Sequence[int]) -> list[int]:
        """Bytes left under the limit of every room, then under the linear one if there is one."""
        pairs = zip(self.rooms, self._sizes(chosen), strict=True)
        left = [room.limit - size for room, size in pairs]
        return left if self.linear is None else [*left, self.linear - self.cost(chosen)[1]]

    def step(self, chosen: Sequence[int]) -> int | None:
        """Bytes of the smallest change of one unit that lowers the loss."""
        more = [
            option.cost[0] - unit.options[at].cost[0]
            for unit, at in zip(self.problem.units, chosen, strict=True)
            for option in unit.options
            if option.damage < unit.options[at].damage
        ]
        return min(more, default=None)

    def refuse(self, budget: str, weights: int) -> None:
        """Raise Infeasible if even the cheapest choice is above a limit."""
        chosen = self.cheapest()
        if min(self.left(chosen), default=0) >= 0:
            return
        inside = self.linear is not None and self.cost(chosen)[1] > self.linear
        shares: dict[str, int] = {}
        for unit, at in zip(self.problem.units, chosen, strict=True):
            option = unit.options[at]
            name = f"{option.target} everywhere else"
            if len(unit.options) == 1:
                name = f"{option.target}, the only choice"
            if unit.outer or option.target.kept:
                name = "embedding and head" if unit.outer else "kept layers"
            shares[name] = shares.get(name, 0) + option.cost[1 if inside else 0]
        sizes = f"{8 * self.cost(chosen)[1] / weights:.4g} bpw"
        if not inside:
            shares["all other weights and files"] = min(self._overhead(chosen))
            sizes += f", {min(self._sizes(chosen)):,} bytes"
        ranked = sorted(shares, key=lambda name: -shares[name])[:3]
        most = "; ".join(f"{name}: {shares[name]:,} bytes" for name in ranked)
        raise Infeasible(
            f"no plan fits the budget {budget.strip()}\nsmallest: {sizes}, of which {most}\n"
            "raise the budget, allow smaller grids, or keep fewer layers"
        )

    def _whole(self) -> tuple[int, ...] | None:
        """16 bits everywhere, if the options and the limits allow it."""
        chosen = []
        for unit in self.problem.units:
            full = [at for at, o in enumerate(unit.options) if code_bits(o.target) == 16]
            if not full:
                return None
            chosen.append(max(full, key=lambda at: unit.options[at].target.kept))
        if self.problem.floor is not None or (self.problem.code_bits or 16) < 16:
            return None
        inside, total = self.cost(chosen)[1], self.cost(chosen)[0]
        if inside > self.problem.limits[1] or any(total > room.limit for room in self.rooms):
            return None
        return tuple(chosen) if min(self.left(chosen), default=0) >= 0 else None

    def _sizes(self, chosen: Sequence[int]) -> list[int]:
        key = tuple(chosen)
        if key not in self._known:
            self._known[key] = [room.size(self.plan(chosen)) for room in self.rooms]
        return self._known[key]

    def _overhead(self, chosen: Sequence[int]) -> list[int]:
        return [size - self.cost(chosen)[0] for size in self._sizes(chosen)]
