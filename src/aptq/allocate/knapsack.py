"""Knapsack: the exact optimum under one limit, by dynamic programming over undominated states.

A state is (bytes spent, loss so far) after some units.  Costs are whole bytes, nothing is rounded;
states that the Lagrangian bound proves worse than a greedy solution are dropped at once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aptq.allocate import Allocator, allocators
from aptq.core.hull import Relaxed, greedy, relax, trim
from aptq.core.problem import Problem, Reduced, Solution

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@allocators.register("knapsack")
@dataclass(frozen=True, kw_only=True)
class Knapsack(Allocator):
    """Exact for any costs; memory grows with the states that no bound excludes."""

    states: int = 20_000_000  # 24 bytes each, over all units; then it refuses

    def solve(self, problem: Problem) -> Solution:
        """Raises ValueError where two limits bind, and where there are too many states."""
        reduced = problem.reduced()
        if len(reduced.room) > 1:
            raise ValueError(
                f"knapsack works with one limit\nhere {len(reduced.room)} limits bind\nuse milp"
            )
        relaxed = relax(reduced)
        chosen = greedy(reduced, relaxed)
        assert chosen is not None, "with one limit the cheapest items always fit"
        upper = reduced.loss(chosen)
        if upper > relaxed.bound:
            core = trim(reduced, relaxed.prices, upper)
            found = self._search(core, relaxed, upper)
            if found is not None and core.loss(found) < upper:
                upper = core.loss(found)
                return problem.unfold(core, found, upper)
        return problem.unfold(reduced, chosen, upper)

    def _search(self, core: Reduced, relaxed: Relaxed, upper: float) -> list[int] | None:
        """Item positions of the best choice, or None if none beats `upper`."""
        price, room = relaxed.prices[0], core.room[0]
        least = [min(item.loss + price * item.cost[0] for item in unit) for unit in core.units]
        rest = sum(least) - price * room
        cost, loss = np.zeros(1), np.zeros(1)
        trail: list[tuple[Indices, Indices]] = []
        count = 0
        for unit, done in zip(core.units, least, strict=True):
            rest -= done
            costs = (cost + np.array([[item.cost[0]] for item in unit])).ravel()
            losses = (loss + np.array([[item.loss] for item in unit])).ravel()
            alive = costs <= room
            alive &= losses + price * costs + rest <= upper + 1e-9 * abs(upper)
            keep = _front(costs, losses, np.flatnonzero(alive))
            if not keep.size:
                return None
            trail.append((keep % cost.size, keep // cost.size))
            cost, loss = costs[keep], losses[keep]
            count += keep.size
            if count > self.states:
                raise ValueError(
                    f"knapsack has too many states\n{count:,} after {len(trail)} of "
                    f"{len(core.units)} units, {self.states:,} allowed\nuse milp"
                )
        state, found = int(np.argmin(loss)), []
        for parents, items in reversed(trail):
            found.append(int(items[state]))
            state = int(parents[state])
        return found[::-1]


def _front(cost: Floats, loss: Floats, alive: Indices) -> Indices:
    """Those of `alive` that no other one beats or equals in both, by rising cost."""
    order = alive[np.lexsort((loss[alive], cost[alive]))]
    best = np.minimum.accumulate(loss[order])
    better = np.ones(order.size, dtype=bool)
    better[1:] = best[1:] < best[:-1]
    return order[better]
