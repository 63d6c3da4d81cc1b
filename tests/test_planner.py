"""Planner: never above the budget, the best of what fits, clear when nothing does."""

from itertools import pairwise

import pytest

from aptq.core.grid import Grid
from aptq.core.plan import Plan, Shapes
from aptq.failures import Infeasible
from aptq.planner import CANDIDATES, Choice, expected_error, uniform

SHAPES: Shapes = {"a.q_proj": (48, 576), "a.down_proj": (576, 1536), "b.q_proj": (48, 576)}
OUTER = 10_000


def choose(budget: str, grids: tuple[Grid, ...] = (), keep: tuple[str, ...] = ()) -> Choice:
    return uniform(SHAPES, grids, budget, keep=keep, size=lambda plan: OUTER + plan.nbytes(SHAPES))


@pytest.mark.parametrize("bits", [2.02, 2.5, 3.0, 3.5, 4.0, 4.3125, 5.1, 8.0, 8.7])
def test_budget_in_bits_is_kept_and_used(bits: float) -> None:
    choice = choose(f"{bits}bpw")
    assert choice.bits <= bits
    assert choice.bits == Plan.uniform(SHAPES, choice.grid).bits(SHAPES)
    better = [
        g for g in CANDIDATES if expected_error(g, SHAPES) < expected_error(choice.grid, SHAPES)
    ]
    assert all(Plan.uniform(SHAPES, grid).bits(SHAPES) > bits for grid in better)


def test_budget_in_bytes_counts_the_whole_checkpoint() -> None:
    exact = choose("4.3125bpw")
    assert choose(f"{exact.nbytes / 1000}kB").nbytes <= exact.nbytes
    less = choose(f"{(exact.nbytes - 1) / 1000}kB")
    assert less.nbytes < exact.nbytes


def test_more_budget_is_never_worse() -> None:
    chosen = [choose(f"{bits / 10}bpw") for bits in range(21, 90)]
    errors = [expected_error(one.grid, SHAPES) for one in chosen]
    assert all(before >= after for before, after in pairwise(errors))


def test_above_everything_nothing_is_lost() -> None:
    assert choose("20bpw").grid == Grid("bf16")


def test_infeasible_tells_what_could_be_reached() -> None:
    with pytest.raises(Infeasible, match=r"int2-row-z: 2\.") as error:
        choose("0.5bpw")
    assert len(str(error.value).splitlines()) == 3


def test_kept_layers_count_at_full_width() -> None:
    with pytest.raises(Infeasible):
        choose("4bpw", keep=("*.down_proj",))
    kept = choose("15.5bpw", keep=("*.down_proj",))
    assert kept.plan.targets["a.down_proj"].kept


def test_one_grid_without_a_budget_is_taken() -> None:
    grid = Grid.parse("int3-g128")
    assert choose("", (grid,)).grid == grid
    with pytest.raises(ValueError, match="neither a grid nor a budget"):
        choose("", CANDIDATES)


def test_grid_and_budget_must_agree() -> None:
    grid = Grid.parse("int4-g64-z")
    assert choose("5bpw", (grid,)).grid == grid
    with pytest.raises(Infeasible):
        choose("4bpw", (grid,))


def test_expected_error_follows_bits_and_groups() -> None:
    def error(text: str) -> float:
        return expected_error(Grid.parse(text), SHAPES)

    assert error("int4-g64-z") < error("int3-g64-z")
    assert error("int4-g32-z") < error("int4-g128-z") < error("int4-row-z")
    assert error("int4-g64-z") < error("int4-g64")  # a zero uses the range of skewed groups
    assert error("bf16") == 0
