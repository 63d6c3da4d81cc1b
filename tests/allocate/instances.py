"""Random allocation problems, and their optimum by trying everything."""

import itertools
import math
import random

from aptq.core.grid import Grid
from aptq.core.plan import PartSpec, Target
from aptq.core.problem import Option, Problem, Unit

TARGETS = [Target((PartSpec(Grid(f"int{bits}", 64)),)) for bits in range(2, 9)]


def random_problem(
    seed: int, *, rows: int = 1, groups: int = 6, options: int = 4, floor: bool = False
) -> Problem:
    """Costs from awkward ranges, losses with ties and negative ones; always feasible."""
    rng = random.Random(seed)
    scale = rng.choice([1, 7, 1000, 10**6, 10**9 + 7])
    units = []
    for number in range(rng.randint(1, groups)):
        choices = []
        for target in TARGETS[: rng.randint(1, options)]:
            cost = tuple(rng.randint(0, 30) * scale + rng.randint(0, 3) for _ in range(rows))
            loss = rng.choice([rng.random(), rng.random() ** 6, round(rng.random(), 1), -0.01])
            choices.append(Option(target, cost, loss))
        units.append(Unit((f"layers.{number // 2}.{number}",), tuple(choices), 64))
    picked = [rng.choice(unit.options) for unit in units]
    limits = [sum(o.cost[row] for o in picked) + rng.choice([0, 0, scale]) for row in range(rows)]
    if not floor:
        return Problem(tuple(units), tuple(limits))
    most = [sum(max(o.cost[row] for o in unit.options) for unit in units) for row in range(rows)]
    allowed = math.fsum(o.damage for o in picked) * rng.choice([1, 1.1])
    return Problem(tuple(units), (most[0], *limits[1:]), floor=allowed)


def brute_force(problem: Problem) -> float:
    """The least loss within the limits, or the least cost[0] with a loss not above the floor."""
    best = math.inf
    for picked in itertools.product(*(unit.options for unit in problem.units)):
        rows = range(len(problem.limits))
        if any(sum(o.cost[row] for o in picked) > problem.limits[row] for row in rows):
            continue
        loss = math.fsum(option.damage for option in picked)
        if problem.floor is None:
            best = min(best, loss)
        elif loss <= problem.floor * (1 + 1e-12):
            best = min(best, sum(option.cost[0] for option in picked))
    return best
