"""Waterfill: the closed form for losses a_g 4^-b_g, reverse water-filling (BAQ, arXiv:2506.05664).

b_g = level + log2(a_g / n_g) / 2, n_g the weights of unit g: every weight then loses equally much.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aptq.allocate import Allocator, allocators
from aptq.core.hull import fill, relax
from aptq.core.problem import Problem, Reduced, Solution


@allocators.register("waterfill")
@dataclass(frozen=True, kw_only=True)
class Waterfill(Allocator):
    """Fits a_g to the table, sets the level so that the clamped bits use the limit, rounds down.

    What rounding leaves is spent by the table's greedy steps.
    """

    base: float = 4.0  # loss falls by this factor for each bit; theory 4, BAQ's code 3.86

    def solve(self, problem: Problem) -> Solution:
        """Raises ValueError for a floor and where two limits bind."""
        reduced = problem.reduced()
        if problem.floor is not None or len(reduced.room) > 1:
            raise ValueError(
                "waterfill works within one size\nhere are "
                f"{len(reduced.room)} limits, floor {problem.floor}\nuse milp or greedy"
            )
        if not reduced.room:  # the best of everything fits
            return problem.unfold(reduced, [0] * len(reduced.units), relax(reduced).bound)
        wanted = self._wanted(problem, reduced)
        at = [
            max((p for p, b in enumerate(bits) if b <= most + 1e-9), default=0)
            for bits, most in zip(_bits(problem, reduced), wanted, strict=True)
        ]
        return problem.unfold(reduced, fill(reduced, at), relax(reduced).bound)

    def _wanted(self, problem: Problem, reduced: Reduced) -> list[float]:
        """Real-valued bits of every unit, within its options, that cost what the limit allows."""
        table = _bits(problem, reduced)
        weights = [unit.weights for unit in problem.units]
        ideal = []
        for bits, unit, count in zip(table, reduced.units, weights, strict=True):
            logs = [
                math.log(item.loss, self.base) + b
                for b, item in zip(bits, unit, strict=True)
                if item.loss > 0
            ]
            ideal.append(math.fsum(logs) / len(logs) - math.log(count, self.base) if logs else 0.0)

        def at(level: float) -> list[float]:
            return [min(max(x + level, b[0]), b[-1]) for x, b in zip(ideal, table, strict=True)]

        spare = 8 * reduced.room[0]
        used = [b[0] for b in table]
        low = min(b[0] - x for x, b in zip(ideal, table, strict=True))
        high = max(b[-1] - x for x, b in zip(ideal, table, strict=True))
        for _ in range(100):  # clamping leaves no closed form for the level; it is monotone
            middle = (low + high) / 2
            cost = sum(n * (b - u) for n, b, u in zip(weights, at(middle), used, strict=True))
            low, high = (middle, high) if cost <= spare else (low, middle)
        return at(low)


def _bits(problem: Problem, reduced: Reduced) -> list[Sequence[float]]:
    """Stored bits for each weight of every item of every unit."""
    row = reduced.rows[0]
    return [
        [8 * source.options[item.option].cost[row] / source.weights for item in unit]
        for source, unit in zip(problem.units, reduced.units, strict=True)
    ]
