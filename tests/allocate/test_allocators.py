"""Allocators: exact where they say so, within every limit to the byte, and the same every time."""

import dataclasses
import math
import random
from itertools import pairwise

import pytest

from aptq.allocate import Allocator, allocators
from aptq.core.hull import relax, steps
from aptq.core.plan import Target
from aptq.core.problem import Option, Problem, Solution, Unit
from aptq.failures import Infeasible
from tests.allocate.instances import TARGETS, brute_force, random_problem

GREEDY, KNAPSACK, MILP, WATERFILL, THRESHOLD = (
    allocators.get(name)() for name in ("greedy", "knapsack", "milp", "waterfill", "threshold")
)
ONE_LIMIT = (GREEDY, KNAPSACK, MILP, WATERFILL)


def within(problem: Problem, solution: Solution) -> bool:
    """Does the solution say what it costs, and is that allowed?"""
    picked = [u.options[at] for u, at in zip(problem.units, solution.chosen, strict=True)]
    cost = tuple(sum(o.cost[row] for o in picked) for row in range(len(problem.limits)))
    assert cost == solution.cost
    assert solution.loss == math.fsum(max(o.loss, 0.0) for o in picked)
    floor = math.inf if problem.floor is None else problem.floor * (1 + 1e-12)
    return all(map(int.__le__, cost, problem.limits)) and solution.loss <= floor


def test_all_are_registered() -> None:
    assert allocators.names() == ("greedy", "knapsack", "milp", "threshold", "waterfill")


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("allocator", [KNAPSACK, MILP])
def test_exact_solvers_equal_brute_force(allocator: Allocator, floor: bool) -> None:
    for seed in range(500):
        problem = random_problem(seed, floor=floor)
        solution = allocator.solve(problem)
        assert within(problem, solution), seed
        best = brute_force(problem)
        found = solution.cost[0] if floor else solution.loss
        assert found == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        assert solution.bound is not None
        assert solution.bound <= best * (1 + 1e-9) + 1e-12, seed


@pytest.mark.parametrize("floor", [False, True])
def test_milp_equals_brute_force_under_two_limits(floor: bool) -> None:
    binding = 0
    for seed in range(500):
        problem = random_problem(10_000 + seed, rows=2, floor=floor)
        solution = MILP.solve(problem)
        assert within(problem, solution), seed
        found = solution.cost[0] if floor else solution.loss
        assert found == pytest.approx(brute_force(problem), rel=1e-9, abs=1e-12), seed
        binding += len(problem.reduced().room) == 2
    assert binding > 100  # else the second limit would not be tested


def test_never_above_a_limit() -> None:
    for seed in range(10_000):
        rows = 2 if seed % 10 == 0 else 1
        problem = random_problem(20_000 + seed, rows=rows)
        solvers = [GREEDY] if rows == 2 else [GREEDY, KNAPSACK, WATERFILL]
        for allocator in [*solvers, *([MILP] if seed % 5 == 0 else [])]:
            try:
                solution = allocator.solve(problem)
            except ValueError:
                assert rows == 2  # greedy may fail where limits pull apart
                continue
            assert within(problem, solution), (seed, allocator)


def test_order_of_solvers_and_bounds() -> None:
    for seed in range(1000):
        problem = random_problem(40_000 + seed, groups=12, options=7)
        greedy, milp, knapsack = (a.solve(problem) for a in (GREEDY, MILP, KNAPSACK))
        reduced = problem.reduced()
        largest = max(
            (step.worth * (_at(reduced, step) - _before(reduced, step)) for step in steps(reduced)),
            default=0.0,
        )
        tolerance = 1e-9 * (1 + greedy.loss)
        assert greedy.bound is not None
        assert greedy.bound <= milp.loss + tolerance, seed
        assert knapsack.loss == pytest.approx(milp.loss, rel=1e-6, abs=1e-12), seed
        assert milp.loss <= greedy.loss + tolerance, seed
        assert greedy.loss <= greedy.bound + largest + tolerance, seed


def _at(reduced, step):  # type: ignore[no-untyped-def]
    return reduced.units[step.unit][step.at].cost[0]


def _before(reduced, step):  # type: ignore[no-untyped-def]
    corners = [s.at for s in steps(reduced) if s.unit == step.unit and s.at < step.at]
    return reduced.units[step.unit][max(corners, default=0)].cost[0]


def test_more_room_never_loses_more() -> None:
    for seed in range(100):
        problem = random_problem(seed, groups=6, options=7)
        room = sum(max(o.cost[0] for o in unit.options) for unit in problem.units)
        least = problem.limits[0]
        limits = [least + (room - least) * part // 8 for part in range(9)]
        for allocator in (KNAPSACK, MILP):
            losses = [
                allocator.solve(dataclasses.replace(problem, limits=(limit,))).loss
                for limit in limits
            ]
            assert all(a >= b - 1e-9 for a, b in pairwise(losses)), seed


@pytest.mark.parametrize("allocator", ONE_LIMIT, ids=lambda one: type(one).__name__)
def test_scale_changes_nothing(allocator: Allocator) -> None:
    for seed in range(100):
        problem = random_problem(seed, groups=8, options=7)
        chosen = allocator.solve(problem).chosen
        costs = 1 if allocator is WATERFILL else 4096  # its bits are bytes, the model needs them
        for loss, cost in ((2.0**-40, 1), (2.0**30, 1), (1.0, costs)):
            units = tuple(
                dataclasses.replace(
                    unit,
                    options=tuple(
                        dataclasses.replace(o, loss=o.loss * loss, cost=(o.cost[0] * cost,))
                        for o in unit.options
                    ),
                )
                for unit in problem.units
            )
            scaled = allocator.solve(Problem(units, (problem.limits[0] * cost,)))
            again = problem.solution(scaled.chosen)
            assert again.loss == pytest.approx(problem.solution(chosen).loss, rel=1e-9), seed


@pytest.mark.parametrize("allocator", ONE_LIMIT, ids=lambda one: type(one).__name__)
def test_same_problem_same_choice(allocator: Allocator) -> None:
    problems = [random_problem(seed, groups=10, options=7) for seed in range(50)]
    first = [allocator.solve(problem) for problem in problems]
    assert first == [allocator.solve(problem) for problem in reversed(problems)][::-1]


@pytest.mark.parametrize("allocator", ONE_LIMIT, ids=lambda one: type(one).__name__)
def test_below_the_least_cost_is_infeasible(allocator: Allocator) -> None:
    problem = random_problem(3)
    least = sum(min(o.cost[0] for o in unit.options) for unit in problem.units)
    assert allocator.solve(dataclasses.replace(problem, limits=(least,))).cost == (least,)
    with pytest.raises(Infeasible, match=f"{least:,}") as caught:
        allocator.solve(dataclasses.replace(problem, limits=(least - 1,)))
    assert len(str(caught.value).splitlines()) == 3


def test_limits_that_exclude_each_other_are_infeasible() -> None:
    options = (Option(TARGETS[0], (0, 5), 0.0), Option(TARGETS[1], (5, 0), 0.0))
    units = tuple(Unit((name,), options, 1) for name in "ab")
    assert MILP.solve(Problem(units, (5, 5))).cost == (5, 5)
    for limits in ((4, 4), (5, 4)):
        with pytest.raises(Infeasible):
            MILP.solve(Problem(units, limits))


def test_one_byte_decides_even_among_billions() -> None:
    """HiGHS itself takes a violation of one in ten million as none."""
    options = (Option(TARGETS[0], (0,), 1.0), Option(TARGETS[1], (10**10 + 1,), 0.0))
    units = tuple(Unit((name,), options, 1) for name in "abcdefgh")
    for allocator in ONE_LIMIT:
        assert allocator.solve(Problem(units, (4 * 10**10 + 4,))).loss == 4
        assert allocator.solve(Problem(units, (4 * 10**10 + 3,))).loss == 5


def test_a_limit_that_binds_only_with_another_is_kept() -> None:
    """The first limit allows every choice alone, the second only some."""
    options = (Option(TARGETS[0], (10, 1), 1.0), Option(TARGETS[1], (20, 9), 0.0))
    units = tuple(Unit((name,), options, 1) for name in "ab")
    solved = [MILP.solve(Problem(units, (40, limit))).loss for limit in (2, 10, 18)]
    assert solved == [2, 1, 0]
    twice = tuple(Option(option.target, option.cost[:1] * 2, option.loss) for option in options)
    alike = Problem(tuple(Unit((name,), twice, 1) for name in "ab"), (30, 30))
    assert len(alike.reduced().room) == 1
    assert KNAPSACK.solve(alike).cost == (30, 30)


def closed(count: int, seed: int) -> Problem:
    """Losses a_g 4^-b on a grid of 1/16 bit, units of very different size."""
    rng = random.Random(seed)
    units = []
    for number in range(count):
        weights, a = 1024 * rng.randint(1, 40), 10 ** rng.uniform(-2, 2)
        bits = [step / 16 for step in range(16, 8 * 16 + 1)]
        options = tuple(Option(TARGETS[0], (int(weights * b / 8),), a * 4**-b) for b in bits)
        units.append(Unit((f"layers.{number}",), options, weights))
    total = sum(unit.weights for unit in units)
    return Problem(tuple(units), (int(total * rng.uniform(2, 6) / 8),))


def test_closed_form_equals_the_optimum_on_its_own_model() -> None:
    for seed in range(20):
        problem = closed(12, seed)
        best, found = MILP.solve(problem), WATERFILL.solve(problem)
        assert best.loss <= found.loss <= best.loss * 1.002, seed
        pairs = zip(_bits(problem, found), _bits(problem, best), strict=True)
        assert sum(abs(one - two) for one, two in pairs) <= 12 / 16, seed  # a step each at most
    equal = closed(1, 0).units[0]
    many = Problem((equal,) * 4, (4 * equal.weights * 3 // 8,))
    assert _bits(many, WATERFILL.solve(many)) == [3.0] * 4


def _bits(problem: Problem, solution: Solution) -> list[float]:
    pairs = zip(problem.units, solution.chosen, strict=True)
    return [8 * unit.options[at].cost[0] / unit.weights for unit, at in pairs]


def two_grids(losses: list[float], weights: list[int]) -> tuple[Unit, ...]:
    """int2 and int4 with a fifth more bytes than codes have."""
    return tuple(
        Unit(
            (f"layers.{number // 2}.{number}",),
            tuple(Option(TARGETS[b - 2], (count * b * 6 // 40,), loss / b) for b in (2, 4)),
            count,
        )
        for number, (loss, count) in enumerate(zip(losses, weights, strict=True))
    )


def test_threshold_raises_the_published_share() -> None:
    units = two_grids([5, 1, 9, 3], [800] * 4)
    for bits, chosen in ((2, 0b0000), (2.5, 0b0010), (3, 0b1010), (3.5, 0b1011), (4, 0b1111)):
        solution = THRESHOLD.solve(Problem(units, (10**6,), code_bits=bits))
        assert solution.chosen == tuple(int(digit) for digit in f"{chosen:04b}"), bits
    assert THRESHOLD.solve(Problem(units, (10**6,), code_bits=3.4999)).chosen == (1, 0, 1, 0)
    with pytest.raises(Infeasible, match=r"1\.9 code bits"):
        THRESHOLD.solve(Problem(units, (10**6,), code_bits=1.9))
    assert THRESHOLD.reads_codes


def test_threshold_raises_whole_blocks() -> None:
    units = two_grids([5, 4, 8, 0], [800] * 4)
    blocks = allocators.get("threshold")(by="block")
    assert blocks.solve(Problem(units, (10**6,), code_bits=3)).chosen == (1, 1, 0, 0)
    assert THRESHOLD.solve(Problem(units, (10**6,), code_bits=3)).chosen == (1, 0, 1, 0)


def test_threshold_in_bytes_and_under_further_limits() -> None:
    units = two_grids([5, 1, 9, 3], [800] * 4)
    stored = allocators.get("threshold")(count="bytes")
    assert not stored.reads_codes
    assert stored.solve(Problem(units, (240 * 4 + 240,))).chosen == (0, 0, 1, 0)
    assert stored.solve(Problem(units, (240 * 4 + 239,))).chosen == (0, 0, 0, 0)
    assert THRESHOLD.solve(Problem(units, (240 * 4 + 240,), code_bits=4)).chosen == (0, 0, 1, 0)
    with pytest.raises(Infeasible):
        stored.solve(Problem(units, (240 * 4 - 1,)))


def test_a_threshold_stays_a_threshold() -> None:
    """The large second layer does not fit; the small third, less sensitive, must not pass it."""
    units = two_grids([9, 5, 1], [400, 4000, 400])
    solution = THRESHOLD.solve(Problem(units, (10**6,), code_bits=2.5))
    assert solution.chosen == (1, 0, 0)


def test_what_an_allocator_cannot_solve_is_refused() -> None:
    options = (Option(TARGETS[0], (0, 5), 1.0), Option(TARGETS[1], (5, 0), 0.0))
    two = Problem(tuple(Unit((name,), options, 1) for name in "ab"), (5, 5))
    for allocator in (KNAPSACK, WATERFILL):
        with pytest.raises(ValueError, match="use milp") as caught:
            allocator.solve(two)
        assert len(str(caught.value).splitlines()) == 3
    floor = random_problem(7, floor=True)
    for allocator in (WATERFILL, THRESHOLD):
        with pytest.raises(ValueError, match="use milp"):
            allocator.solve(floor)
    with pytest.raises(ValueError, match="threshold decides between two grids"):
        THRESHOLD.solve(random_problem(7, options=4))


def test_knapsack_refuses_with_numbers_when_states_explode() -> None:
    problem = large(blocks=10)
    assert KNAPSACK.solve(problem).loss == pytest.approx(MILP.solve(problem).loss, rel=1e-6)
    with pytest.raises(ValueError, match=r"of 70 units, 10 allowed\nuse milp"):
        allocators.get("knapsack")(states=10).solve(problem)


def test_the_relaxation_of_several_limits_is_tight() -> None:
    """Half a unit under each of two limits: the linear program says so, prices prove it."""
    options = (Option(TARGETS[0], (0, 0), 1.0), Option(TARGETS[1], (10, 10), 0.0))
    units = tuple(Unit((name,), options, 1) for name in "ab")
    other = Unit(("c",), (options[0], Option(TARGETS[1], (0, 8), 0.0)), 1)
    relaxed = relax(Problem((*units, other), (5, 9)).reduced())
    assert relaxed.bound == pytest.approx(1.5 + 0.5, rel=1e-6)


def large(blocks: int = 80) -> Problem:
    """Linears of a 70B model at 28 candidates."""
    rng = random.Random(0)
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)]
    shapes += [(28672, 8192), (28672, 8192), (8192, 28672)]
    units = []
    for number in range(blocks * 7):
        rows, columns = shapes[number % 7]
        weights, a = rows * columns, 10 ** rng.uniform(-3, 0)
        options = []
        for candidate in range(28):
            bits = 2 + candidate // 4 + (16.0 / columns, 0.14, 0.28, 0.56)[candidate % 4]
            loss = a * 4**-bits * rng.uniform(0.8, 1.2)
            options.append(Option(Target(), (int(weights * bits / 8),), loss))
        units.append(Unit((f"layers.{number}",), tuple(options), weights))
    total = sum(unit.weights for unit in units)
    return Problem(tuple(units), (int(total * 3.3 / 8),))


def test_a_large_model_takes_seconds(capfd: pytest.CaptureFixture[str]) -> None:
    problem = large()
    milp, knapsack, greedy = (a.solve(problem) for a in (MILP, KNAPSACK, GREEDY))
    assert milp.loss == pytest.approx(knapsack.loss, rel=1e-6)
    assert milp.loss <= greedy.loss <= milp.loss * 1.001
    assert problem.limits[0] - milp.cost[0] < 1e-4 * problem.limits[0]
    assert capfd.readouterr().out == ""  # HiGHS keeps its own notes to itself
