"""The second moment equals its float64 definition, however rows come and whatever they weigh."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aptq.core import gram
from aptq.core.gram import add_by_weight, add_gram, add_weighted, each_stretch
from aptq.engine.stat import Seen
from aptq.stats import hessian
from aptq.stats.hessian import Hessian

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


def weighted(stat: Hessian, x: torch.Tensor, weight: torch.Tensor) -> Hessian:
    filled = stat.start(x.shape[1], CPU)
    for rows_, weights in zip(x.split(7), weight.split(7), strict=True):
        filled.update(Seen(rows_, None, LENGTH, weight=weights))
    return filled


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from([0.0, 0.5, 1.0]))
def test_gradient_weights_equal_float64_definition(count: int, columns: int, power: float) -> None:
    x, weight = rows(count, columns), rows(count, 1, seed=1).squeeze(1).exp()
    found = weighted(Hessian(rows="gradient", power=power), x, weight).matrix()
    wide, share = x.double(), weight.double() ** power
    expected = (wide * share[:, None]).T @ wide / share.sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_scale_of_weights_does_not_matter() -> None:
    """An expert may get only rows of little weight; its H keeps the scale of its inputs."""
    x, stat = rows(9, 5), Hessian(rows="gradient")
    one = weighted(stat, x, torch.full((9,), 1e-3)).matrix()
    torch.testing.assert_close(one, shown(Hessian(), x).matrix())


def test_rows_that_are_not_finite_weigh_nothing() -> None:
    x, weight = rows(6, 4), torch.tensor([1.0, 2, 3, 4, 5, 6])
    bad = x.clone()
    bad[2, 1] = torch.nan
    found = weighted(Hessian(rows="gradient"), bad, weight)
    assert float(found.sums["dropped"]) == 1
    assert float(found.sums["weight"]) == 18
    weight[2] = 0
    torch.testing.assert_close(
        found.matrix(), weighted(Hessian(rows="gradient"), x, weight).matrix()
    )


def test_rows_of_one_weight_together_are_the_same() -> None:
    x, weight = rows(60, 130), torch.tensor([0.0, 0.5, 3.0]).repeat(20)
    one, two = torch.zeros(130, 130), torch.zeros(130, 130)
    add_weighted(one, x, weight)
    add_by_weight(two, x, weight, weight.unique())
    torch.testing.assert_close(one.triu(), two.triu(), rtol=1e-5, atol=1e-5)


def test_stretches_of_windows_are_the_same() -> None:
    x, runs = rows(6 * LENGTH, 130), [(3.0, 1), (0.0, 2), (0.5, LENGTH - 3)]
    weight = torch.tensor([value for value, count in runs for _ in range(count)]).repeat(6)
    one, two = torch.zeros(130, 130), torch.zeros(130, 130)
    add_weighted(one, x, weight)
    for share, part in each_stretch(runs, x):
        add_gram(two, part, share)
    torch.testing.assert_close(one.triu(), two.triu(), rtol=1e-5, atol=1e-5)


def test_gradient_rows_need_weights() -> None:
    stat = Hessian(rows="gradient")
    assert not Hessian(rows="gradient").own
    assert Hessian(rows="gradient", share=False).own
    assert not Hessian().own
    with pytest.raises(ValueError, match="rows = 'uniform'"):
        stat.start(4, CPU).update(Seen(rows(3, 4), None, LENGTH))


@pytest.mark.parametrize("options", [{"first": 0.1, "rows": "gradient"}, {"power": -1.0}])
def test_weightings_that_exclude_each_other(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cannot be weighted like this"):
        Hessian(**options)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_weighted_rows_on_a_gpu() -> None:
    """16-bit rows are never rounded by their weights, whether few weights occur or many."""
    x = rows(2048, 256).to("cuda", torch.bfloat16)
    few = torch.tensor([1e-3, 0.7, 66.0, 3.3], device="cuda").repeat(512)
    for weight in (few, rows(2048, 1).squeeze(1).exp().to("cuda")):
        total = torch.zeros(256, 256, device="cuda")
        add_weighted(total, x, weight)
        wide = x.double()
        expected = (wide * weight.double()[:, None]).T @ wide
        error = (total.double().triu() - expected.triu()).norm() / expected.triu().norm()
        assert error < 1e-5, error


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{"rows": "gradient"}, {"first": 0.3}, {}])
def test_sums_of_the_matrix_units(
    options: dict[str, object], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole windows in 16 bits, a massive first token, a row that is not finite, drift."""
    if device == "cpu":  # which multiplies 16-bit matrices by other calls
        plain = torch.mm
        for module in (gram, hessian):
            monkeypatch.setattr(module, "exact_products", lambda x: x.dtype == torch.bfloat16)
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: plain(a.float(), b.float()))
    length, columns = 64, 2500 if device == "cuda" else 70
    x = rows(32 * length, columns).to(torch.bfloat16)
    x[::length, 5] *= 1000
    original = x + rows(32 * length, columns, seed=1).to(torch.bfloat16) / 16
    x[70, 3] = torch.inf
    runs = [(30.0, 1), (1.7, 15), (0.01, 48)]
    if "first" in options:
        runs = [(0.3 * length, 1), (1.0, length - 1)]
    elif not options:
        runs = [(1.0, length)]
    weight = torch.tensor([value for value, count in runs for _ in range(count)]).repeat(32)
    position = torch.arange(len(x)) % length
    empty = Hessian(drift=True, **options)  # type: ignore[arg-type]
    filled = empty.start(columns, torch.device(device))
    shown = Seen(x, position, length, None, original, runs, weight)
    filled.update(Seen(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in shown)))
    weight[70], x[70] = 0, 0
    wide = x.double()
    H = (wide * weight[:, None].double()).T @ wide
    assert float(filled.sums["weight"]) == pytest.approx(float(weight.double().sum()), rel=1e-6)
    assert float(filled.sums["dropped"]) == 1
    scale = H.diagonal().sqrt().outer(H.diagonal().sqrt())
    assert ((filled.sums["h"].double().cpu() - H).triu().abs() <= 1e-5 * scale).all()
    moved = (original.double() - wide) * weight[:, None].double()
    R = moved.T @ wide
    error = (filled.sums["cross"].double().cpu() - R).norm() / R.norm()
    assert error < 1e-3, error
