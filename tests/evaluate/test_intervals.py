"""Intervals cover what they promise; paired tests equal scipy's and the definition."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from aptq.evaluate.intervals import interval, paired


def normal(count: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64).tolist()


@pytest.mark.parametrize("count", [6, 40])
def test_an_interval_holds_the_expected_mean(count: int) -> None:
    # of 300 samples 285 are expected, with a standard deviation of 3.8
    held = 0
    for seed in range(300):
        found = interval(normal(count, seed), seed=seed)
        assert found is not None
        held += found.low <= 0 <= found.high
    assert 270 <= held <= 298


@pytest.mark.parametrize(("count", "others"), [(10, 10), (40, 8), (8, 200)])
def test_an_interval_of_others_holds_their_mean(count: int, others: int) -> None:
    held = 0
    for seed in range(300):
        found = interval(normal(count, seed), others=others, seed=seed)
        assert found is not None
        held += found.low <= sum(normal(others, 10_000 + seed)) / others <= found.high
    assert 270 <= held <= 298


def test_of_normal_values_it_is_the_t_interval() -> None:
    values = normal(50, 0)
    found = interval(values)
    wanted = stats.t.interval(0.95, 49, loc=sum(values) / 50, scale=stats.sem(values))
    assert found is not None
    assert found == pytest.approx(wanted, abs=0.03)


def test_the_draws_are_private_and_repeatable() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])
    assert interval(normal(9, 0)) != interval(normal(9, 0), seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_many_windows_go_in_pieces() -> None:
    found = interval(normal(9000, 0))
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(9000), rel=0.05)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval(values: list[float]) -> None:
    assert interval(values) is None


def test_paired_differences_of_numbers() -> None:
    ours, theirs = normal(30, 0), normal(30, 1)
    found, wanted = paired(ours, theirs), stats.ttest_rel(ours, theirs)
    assert found.test == "paired t"
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.difference == pytest.approx((sum(ours) - sum(theirs)) / 30)
    assert found.difference / found.stderr == pytest.approx(wanted.statistic)


def test_paired_answers() -> None:
    # 3 items only we have right, 9 only they have, the rest alike
    ours = [1.0] * 3 + [0.0] * 9 + [1.0] * 20 + [0.0] * 8
    theirs = [0.0] * 3 + [1.0] * 9 + [1.0] * 20 + [0.0] * 8
    found = paired(ours, theirs)
    assert found.test == "McNemar"
    assert found.p == pytest.approx(stats.binomtest(3, 12).pvalue)
    assert found.difference == pytest.approx(-6 / 40)
    swapped = paired(theirs, ours)
    assert (swapped.difference, swapped.p) == (-found.difference, found.p)


def test_equal_models() -> None:
    assert paired([1.0, 0.0], [1.0, 0.0]).p == 1.0
    assert paired([1.5, 0.0], [1.5, 0.0]).p == 1.0
    assert paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).p == 0.0


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 values"):
        paired([1.0, 0.0], [1.0, 0.0, 1.0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_half_of_the_windows_tells_of_the_other(seed: int) -> None:
    """As differences of two models are: skewed, with a common part and a few large ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(148, generator=generator, dtype=torch.float64)
    moved = 0.05 + 0.01 * (noise + 0.5 * noise.square())
    held = narrow = 0
    for number in range(100):
        order = moved[torch.randperm(148, generator=generator)]
        one, other = order[:74].tolist(), order[74:].mean().item()
        ahead, alone = interval(one, others=74, seed=number), interval(one, seed=number)
        assert ahead is not None
        assert alone is not None
        held += ahead.low <= other <= ahead.high
        narrow += alone.low <= other <= alone.high
    assert 90 <= held <= 99
    assert narrow < 90  # the interval of the expected mean is not for this


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "intervals-cpu.json"


@pytest.mark.skipif(not RESULTS.is_file(), reason="benchmarks/intervals.py has not been run")
def test_the_same_of_the_windows_of_a_real_run() -> None:
    rows = json.loads(RESULTS.read_text("utf-8"))["rows"]
    before, after = (row["nlls"] for row in rows if "nlls" in row)
    moved = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    generator, half, held = torch.Generator().manual_seed(11), len(moved) // 2, 0
    for number in range(100):
        order = moved[torch.randperm(len(moved), generator=generator)]
        found = interval(order[:half].tolist(), others=len(moved) - half, seed=number)
        assert found is not None
        held += found.low <= order[half:].mean().item() <= found.high
    assert 90 <= held <= 99
    assert all(90 <= row["held"] <= 99 for row in rows if "held" in row)
