"""MILP: the optimum under any number of limits, by HiGHS (AdaQuant's integer program, 2006.10518).

min sum x[u,c] loss[u,c]  s.t.  sum_c x[u,c] = 1 for every u, sum x[u,c] cost_r[u,c] <= limit_r.
"""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from aptq.allocate import Allocator, allocators
from aptq.core.hull import fill, greedy, relax, trim
from aptq.core.problem import Item, Problem, Reduced, Solution
from aptq.failures import Infeasible

ROOM = 1e5  # every limit is scaled to this: HiGHS takes 1e-6 above a limit as kept
TRIES = 50  # programs; each excludes the choices that exceeded a limit like the one before
Cover = tuple[int, dict[int, float]]  # see _cover


@allocators.register("milp")
@dataclass(frozen=True, kw_only=True)
class Milp(Allocator):
    """What prices prove useless is left out first; the answer is checked in whole bytes."""

    gap: float = 1e-7  # relative to the optimum; far below the noise of any score
    seconds: float = 60.0  # then the best found so far, with its bound; seconds suffice for 70B

    def solve(self, problem: Problem) -> Solution:
        """Raises Infeasible where no choice keeps all limits."""
        reduced = problem.reduced()
        relaxed = relax(reduced)
        bound = relaxed.bound
        first = greedy(reduced, relaxed)
        if first is not None:
            upper = reduced.loss(first)
            if upper <= bound * (1 + self.gap):
                return problem.unfold(reduced, first, bound)
            core = trim(reduced, relaxed.prices, upper)
        else:
            core, upper = reduced, 0.0
        found, proven = self._search(core, upper)
        bound = max(bound, proven)
        if found is not None and (first is None or core.loss(found) < upper):
            return problem.unfold(core, found, min(bound, core.loss(found)))
        if first is None:
            raise Infeasible(
                f"no choice was found within all {len(reduced.room)} limits\neach alone can be "
                "reached; the search stopped after {self.seconds:g} s at most\n"
                "raise one of the limits, allow smaller grids, or keep fewer layers"
            )
        return problem.unfold(reduced, first, min(bound, upper))

    def _search(self, core: Reduced, upper: float) -> tuple[tuple[int, ...] | None, float]:
        """Item positions within the room, if any were found, and a lower bound of the loss."""
        covers: list[Cover] = []
        bound = -np.inf
        for _ in range(TRIES):
            at, proven = self._program(core, upper, covers)
            bound = max(bound, proven)
            if at is None:
                break
            if core.fits(at):
                return fill(core, at), bound
            covers.append(_cover(core, at))
        return None, bound

    def _program(
        self, core: Reduced, upper: float, covers: Sequence[Cover]
    ) -> tuple[list[int] | None, float]:
        """Solve once, in moderate numbers; the choice may exceed the room by rounding."""
        flat = [(number, at) for number, unit in enumerate(core.units) for at in range(len(unit))]
        items = [core.units[number][at] for number, at in flat]
        losses = np.array([item.loss for item in items])
        scale = 1e3 / (upper or float(np.abs(losses).max()) or 1.0)  # HiGHS stops at 1e-6 absolute
        wide = np.array([(room or 1.0) / ROOM for room in core.room])
        costs = np.array([item.cost for item in items]).reshape(len(items), -1).T / wide[:, None]
        number = np.array([number for number, _ in flat])
        rows = [csr_array((np.ones(len(flat)), (number, np.arange(len(flat)))))]
        rows += [csr_array(costs)] if core.room else []
        rows += [csr_array([_cut(cover, flat, items)]) for cover in covers]
        most = [np.ones(len(core.units)), np.array(core.room) / wide]
        most.append(np.array([len(cover) - 1.0 for _, cover in covers]))
        least = [most[0], np.full(len(core.room) + len(covers), -np.inf)]
        limits = LinearConstraint(vstack(rows, "csr"), np.concatenate(least), np.concatenate(most))
        options = {"mip_rel_gap": self.gap, "time_limit": self.seconds}
        whole = np.ones(len(flat))
        with _quiet():
            found = milp(losses * scale, integrality=whole, bounds=Bounds(0, 1),
                         constraints=limits, options=options)  # fmt: skip
        bound = -np.inf if found.mip_dual_bound is None else found.mip_dual_bound / scale
        if found.x is None:
            return None, bound
        shares = np.split(found.x, np.cumsum([len(unit) for unit in core.units])[:-1])
        return [int(np.argmax(share)) for share in shares], bound


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what HiGHS 1.12 prints of its own debugging (ERGO-Code/HiGHS issue 2783)."""
    if os.name != "posix":
        yield
        return
    sys.stdout.flush()
    screen = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C keeps its own buffer
        os.dup2(screen, 1)
        os.close(screen)


def _cover(core: Reduced, at: Sequence[int]) -> tuple[int, dict[int, float]]:
    """An exceeded row, and few units whose choices exceed it alone: unit -> cost there."""
    pairs = enumerate(zip(core.cost(at), core.room, strict=True))
    row = next(row for row, (cost, room) in pairs if cost > room)
    costs = {number: unit[at[number]].cost[row] for number, unit in enumerate(core.units)}
    cover: dict[int, float] = {}
    for number in sorted(costs, key=lambda number: -costs[number]):
        cover[number] = costs[number]
        if math.fsum(cover.values()) > core.room[row]:
            break
    return row, cover


def _cut(cover: Cover, flat: Sequence[tuple[int, int]], items: Sequence[Item]) -> list[float]:
    """Row of the inequality that not all units of a cover take what they took, or a dearer item."""
    row, costs = cover
    return [
        float(number in costs and item.cost[row] >= costs[number])
        for (number, _), item in zip(flat, items, strict=True)
    ]
