"""The second moment equals its float64 definition, however rows come and whatever they weigh."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aptq.engine.stat import Seen
from aptq.stats.hessian import Hessian, add_gram

CPU = torch.device("cpu")
LENGTH = 6


def rows(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def shown(stat: Hessian, *batches: torch.Tensor) -> Hessian:
    filled = stat.start(batches[0].shape[1], CPU)
    for x in batches:
        filled.update(Seen(x, torch.arange(len(x)) % LENGTH, LENGTH))
    return filled


def reference(x: torch.Tensor, first: float) -> torch.Tensor:
    weight = torch.ones(len(x), dtype=torch.float64)
    weight[::LENGTH] = max(1.0, first * LENGTH)
    wide = x.double()
    return (wide * weight[:, None]).T @ wide / weight.sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.sampled_from([0.0, 0.1, 0.5]))
def test_equals_float64_definition(windows: int, columns: int, first: float) -> None:
    x = rows(windows * LENGTH, columns)
    found = shown(Hessian(first=first), x).matrix()
    torch.testing.assert_close(found.double(), reference(x, first), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_batches_and_workers_add_up() -> None:
    x = rows(4 * LENGTH, 20)
    whole = shown(Hessian(first=0.5), x)
    one, two = (shown(Hessian(first=0.5), part) for part in x.chunk(2))
    one.merge(two)
    torch.testing.assert_close(one.matrix(), whole.matrix())


def test_rows_that_are_not_finite_are_dropped_and_counted() -> None:
    x = rows(2 * LENGTH, 8)
    bad = x.clone()
    bad[3, 2], bad[7, 0] = torch.nan, torch.inf
    good = x[[i for i in range(len(x)) if i not in (3, 7)]].double()
    found = shown(Hessian(), bad)
    assert float(found.sums["dropped"]) == 2
    torch.testing.assert_close(
        found.matrix().double(), good.T @ good / len(good), rtol=1e-5, atol=1e-6
    )


def test_options_are_the_key() -> None:
    assert Hessian(first=0.5) == Hessian(first=0.5).start(4, CPU)
    assert Hessian(first=0.5) != Hessian()
    assert len({Hessian(), Hessian().start(4, CPU), Hessian(first=0.1)}) == 2


def test_first_token_needs_positions() -> None:
    filled = Hessian(first=0.5).start(4, CPU)
    with pytest.raises(ValueError, match="first = 0"):
        filled.update(Seen(rows(3, 4), None, LENGTH))


def test_factor_is_the_inverse_in_order() -> None:
    filled = shown(Hessian(), rows(8 * LENGTH, 10))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    factor, _ = filled.factor(0.01, order)
    assert factor is not None
    assert filled.factor(0.01, order)[0] is factor
    H = filled.matrix().double()
    H = (H + 0.01 * H.diagonal().mean() * torch.eye(10))[order][:, order]
    U = factor.inner.double()
    torch.testing.assert_close(U.T @ U @ H, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-4)


def test_only_the_upper_triangle_is_promised() -> None:
    x, total = rows(50, 301), torch.zeros(301, 301)
    add_gram(total, x)
    torch.testing.assert_close(total.triu(), (x.T @ x).triu(), rtol=1e-4, atol=1e-4)
