"""Quantiles against sorting, and outliers that were planted."""

import pytest
import torch

from aptq.core.outliers import largest_kept, quantile


def gaussian(count: int = 100_000, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.005, 0.25, 0.8, 1.0])
def test_quantile_is_an_order_statistic(share: float) -> None:
    values = gaussian(10_007).abs()
    expected = values.sort().values[int(-(-share * len(values) // 1)) - 1]
    torch.testing.assert_close(quantile(values, share), expected, rtol=0, atol=1e-7)
    assert (values <= quantile(values, share)).sum() >= share * len(values)


def test_quantile_of_equal_values() -> None:
    assert quantile(torch.zeros(5), 0.5) == 0
    assert quantile(torch.full((5,), 0.5), 0.5) == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_planted_outliers_are_found_exactly(seed: int) -> None:
    values = gaussian(seed=seed)
    where = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:7]
    values[where] = 20.0 * torch.tensor([1, -1, 1, 1, -1, 1, -1.01])
    found = (values.abs() > largest_kept(values.view(100, 1000))).nonzero().flatten()
    assert set(found.tolist()) == set(where.tolist())


def test_nothing_stands_apart_in_uniform_data() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 0.5
    assert largest_kept(values) == values.abs().max()
    assert largest_kept(torch.zeros(10)) == 0


def test_a_gaussian_keeps_nearly_all() -> None:
    for seed in range(4):
        values = gaussian(seed=seed)
        assert (values.abs() > largest_kept(values)).sum() <= 2


def test_split_against_all_splits() -> None:
    values = torch.cat([gaussian(400), torch.tensor([6.0, 6.1, 9.0, 9.2, 30.0, 31.0])]).abs()
    ordered = values.double().sort().values
    first, third = quantile(values, 0.25), quantile(values, 0.75)
    start = int((ordered <= third + 1.5 * (third - first)).sum())
    merits = {
        cut: (ordered[cut] - ordered[cut - 1]) ** 2 - ordered[:cut].var(unbiased=False)
        for cut in range(start, len(ordered))
    }
    best = max(merits, key=lambda cut: float(merits[cut]))
    assert largest_kept(values) == pytest.approx(float(ordered[best - 1]))
