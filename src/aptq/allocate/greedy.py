"""Greedy: walk the convex hulls, the steps that save most loss a byte first, then fill the slack.

Solves the linear relaxation and rounds it down, so with one limit it loses at most what one step of
one unit saves; several limits are weighed by their Lagrangian prices.
"""

from dataclasses import dataclass

from aptq.allocate import Allocator, allocators
from aptq.core.hull import greedy, relax
from aptq.core.problem import Problem, Solution


@allocators.register("greedy")
@dataclass(frozen=True, kw_only=True)
class Greedy(Allocator):
    """Fast at any size, close to the optimum, with a proven bound of what it may have missed."""

    def solve(self, problem: Problem) -> Solution:
        """Raises ValueError where limits pull in opposite directions and rounding fails."""
        reduced = problem.reduced()
        relaxed = relax(reduced)
        chosen = greedy(reduced, relaxed)
        if chosen is None:
            raise ValueError(
                f"greedy found no choice within all limits\n{len(reduced.units)} units under "
                f"{len(reduced.room)} limits; there may be one\nuse milp"
            )
        return problem.unfold(reduced, chosen, relaxed.bound)
