"""Threshold: the most sensitive layers get the higher of two grids (APTQ, arXiv:2402.14866).

Mean bits = high R + low (1 - R); R is the share of weights above the threshold.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from aptq.allocate import Allocator, allocators
from aptq.core.problem import Problem, Solution, Unit, code_bits
from aptq.failures import Infeasible


@allocators.register("threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold(Allocator):
    """Sensitivity is the loss of the cheaper grid; raises from the top until the next is too much.

    Nothing of lower sensitivity is raised in the place of what did not fit: a threshold remains.
    """

    count: Literal["codes", "bytes"] = "codes"  # the paper counts bits of codes, without scales
    by: Literal["layer", "block"] = "layer"  # read from the paper's ablation; it does not say

    @property
    def reads_codes(self) -> bool:
        """As the option `count` says."""
        return self.count == "codes"

    @property
    def ranks(self) -> bool:
        """A trace is the same for both grids."""
        return True

    def solve(self, problem: Problem) -> Solution:
        """Raises ValueError for a floor, or for units with more than two options."""
        problem.reduced()  # refuses what nothing can reach
        pairs = [_pair(unit, problem.floor) for unit in problem.units]
        at = [low for low, _ in pairs]
        limits, inner = list(map(Fraction, problem.limits)), _inner(problem.units)
        if self.reads_codes and problem.code_bits is not None:
            limits.append(Fraction(str(problem.code_bits)) * sum(unit.weights for unit in inner))
        spent = [sum(column) for column in zip(*map(_spent, problem.units, at), strict=True)]
        if any(s > limit for s, limit in zip(spent, limits, strict=False)):
            raise Infeasible(
                f"no choice fits {problem.code_bits} code bits for each weight\nthe lower grid "
                f"everywhere has {spent[-1] / max(1, sum(unit.weights for unit in inner)):.4g}\n"
                "raise the budget, or give a lower grid"
            )
        for members in self._ranked(problem.units, at):
            for number in members:
                unit, (low, high) = problem.units[number], pairs[number]
                more = zip(spent, _spent(unit, high), _spent(unit, low), strict=True)
                spent = [total + up - down for total, up, down in more]
            if any(s > limit for s, limit in zip(spent, limits, strict=False)):
                break
            for number in members:
                at[number] = pairs[number][1]
        return problem.solution(at)

    def _ranked(self, units: Sequence[Unit], low: Sequence[int]) -> list[list[int]]:
        """Unit numbers that are raised together, the most sensitive first."""
        together: dict[str, list[int]] = {}
        for number, unit in enumerate(units):
            name = _block(unit) if self.by == "block" else str(number)
            together.setdefault(name, []).append(number)

        def sensitivity(members: list[int]) -> float:
            return sum(units[number].options[low[number]].damage for number in members)

        return sorted(together.values(), key=lambda members: -sensitivity(members))


def _inner(units: Sequence[Unit]) -> list[Unit]:
    return [unit for unit in units if not unit.outer]


def _spent(unit: Unit, at: int) -> tuple[int, ...]:
    """Cost of an option in every resource, and last its code bits, which only blocks have."""
    option = unit.options[at]
    return (*option.cost, 0 if unit.outer else unit.weights * code_bits(option.target))


def _pair(unit: Unit, floor: float | None) -> tuple[int, int]:
    """Numbers of the lower and the higher option; equal where there is one."""
    if len(unit.options) > 2 or floor is not None:
        wanted = "a quality floor" if floor is not None else f"{len(unit.options)} grids"
        raise ValueError(
            f"threshold decides between two grids within a size\n{unit.layers[0]} has {wanted}\n"
            "give two grids and a size, or use milp"
        )
    order = sorted(range(len(unit.options)), key=lambda at: unit.options[at].cost)
    return order[0], order[-1]


def _block(unit: Unit) -> str:
    """The name of its first layer up to the block's number; outside the blocks the whole name."""
    found = re.match(r".*?\.\d+(?=\.)", unit.layers[0])
    return found[0] if found else unit.layers[0]
