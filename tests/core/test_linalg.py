"""The factor of the inverse Hessian against float64, and every rung of the ladder."""

import pytest
import torch
from torch import Tensor

from aptq.core import linalg
from aptq.core.linalg import damped_factor, dead_columns, product, split


def hessian_of(columns: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return x.T @ x / tokens


def damped(hessian: Tensor, share: float, floor: float = 0.0) -> Tensor:
    H = (hessian.double() + hessian.double().T) / 2
    diagonal = H.diagonal()
    added = share * diagonal.mean() + floor * diagonal.max()
    return H + added * torch.eye(len(H), dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 2, 37, 129, 300])  # leaf, odd halves, two levels
def test_factor_of_the_inverse(columns: int) -> None:
    H = hessian_of(columns, 4 * columns)
    before = H.clone()
    factor, damping = damped_factor(H, 0.01)
    assert factor is not None
    U = factor.inner
    assert torch.equal(H, before)
    assert torch.equal(U, U.triu())
    assert U.diagonal().gt(0).all()
    product = U.double().T @ U.double() @ damped(H, 0.01)
    torch.testing.assert_close(product, torch.eye(columns).double(), rtol=0, atol=2e-3)
    assert (damping.damp, damping.fallbacks, damping.rung) == (0.01, 0, "cholesky")


def test_order_permutes_before_factoring() -> None:
    H, order = hessian_of(40, 100), torch.randperm(40)
    ordered, _ = damped_factor(H, order=order)
    plain, _ = damped_factor(H[order][:, order])
    assert ordered is not None
    assert plain is not None
    torch.testing.assert_close(ordered.inner, plain.inner, rtol=1e-4, atol=1e-5)


def test_asymmetry_is_averaged() -> None:
    H = hessian_of(20, 100)
    skew = torch.randn(20, 20)
    plain, _ = damped_factor(H)
    tilted, _ = damped_factor(H + skew - skew.T)
    assert plain is not None
    assert tilted is not None
    torch.testing.assert_close(plain.inner, tilted.inner, rtol=1e-3, atol=1e-4)


def test_dead_columns_are_cut_off_and_counted() -> None:
    H = hessian_of(12, 50)
    live = torch.ones(12, dtype=torch.bool)
    live[[3, 7]] = False
    H[~live], H[:, ~live] = 0.0, 0.0
    assert torch.equal(dead_columns(H), ~live)
    factor, damping = damped_factor(H, 0.01)
    alone, _ = damped_factor(H[live][:, live], 0.01)
    assert factor is not None
    assert alone is not None
    torch.testing.assert_close(factor.inner[live][:, live], alone.inner)
    off = factor.inner - factor.inner.diagonal().diag()
    assert off[~live].eq(0).all()
    assert off[:, ~live].eq(0).all()
    assert damping.dead == 2


def test_dead_columns_with_noise_beside_a_zero_diagonal() -> None:
    H = hessian_of(12, 50)
    H[3, 3], H[7, 7] = 0.0, -1e-3
    live = torch.ones(12, dtype=torch.bool)
    live[[3, 7]] = False
    factor, damping = damped_factor(H, 0.01)
    assert factor is not None
    assert (damping.dead, damping.fallbacks) == (2, 0)
    off = factor.inner - factor.inner.diagonal().diag()
    assert off[~live].eq(0).all()
    assert off[:, ~live].eq(0).all()
    mean = H.diagonal()[live].mean()
    weight = factor.inner.diagonal()[~live] ** -2
    torch.testing.assert_close(weight, (1.01 * mean).expand(2), rtol=1e-4, atol=0)


def test_nothing_seen_at_all() -> None:
    factor, damping = damped_factor(torch.zeros(5, 5))
    assert factor is not None
    assert factor.inner.isfinite().all()
    assert damping.dead == 5


def test_scale_of_the_hessian_does_not_matter() -> None:
    H = hessian_of(30, 20)  # singular: fewer tokens than columns
    H[4], H[:, 4] = 0.0, 0.0
    units = []
    for scale in (1e-12, 1.0, 1e12):
        factor, damping = damped_factor(H * scale)
        assert factor is not None
        assert damping.fallbacks == 0
        units.append(factor.inner / factor.inner.diagonal()[:, None])
    torch.testing.assert_close(units[0], units[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(units[2], units[1], rtol=1e-3, atol=1e-3)


def test_damping_is_doubled_until_it_is_enough() -> None:
    H = hessian_of(20, 100)
    H -= (torch.linalg.eigvalsh(H)[0] + 0.1 * H.diagonal().mean()) * torch.eye(20)
    factor, damping = damped_factor(H, 0.01)
    share = damping.damp
    assert factor is not None
    assert damping.rung == "damped"
    assert share == 0.01 * 2**damping.fallbacks
    assert share <= 1
    product = factor.inner.double().T @ factor.inner.double() @ damped(H, share)
    torch.testing.assert_close(product, torch.eye(20).double(), rtol=0, atol=1e-3)


def test_without_damping_a_singular_matrix_climbs() -> None:
    factor, damping = damped_factor(torch.ones(6, 6), 0.0)
    assert factor is not None
    assert damping.fallbacks > 0
    assert damping.damp > 0


def test_floor_comes_after_full_damping() -> None:
    H = torch.eye(20)
    H[0, 1] = H[1, 0] = 30.0  # eigenvalue -29, mean diagonal 5.95
    H[2, 2] = 100.0
    factor, damping = damped_factor(H, 0.5)
    assert factor is not None
    assert damping == linalg.Damping(1.0, 1.0, 8, 0, "floor")
    product = factor.inner.double().T @ factor.inner.double() @ damped(H, 1.0, 1.0)
    torch.testing.assert_close(product, torch.eye(20).double(), rtol=0, atol=1e-5)


def test_float64_is_the_last_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linalg._inverse_factor
    H = hessian_of(20, 100)

    def fails_in_float32(matrix: Tensor, added: float) -> Tensor | None:
        return None if matrix.dtype == torch.float32 else plain(matrix, added)

    monkeypatch.setattr(linalg, "_inverse_factor", fails_in_float32)
    factor, damping = damped_factor(H, 0.01)
    assert factor is not None
    assert damping.rung == "float64"
    assert damping.damp == 0.01
    product = factor.inner.double().T @ factor.inner.double() @ damped(H, 0.01)
    torch.testing.assert_close(product, torch.eye(20).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gives_no_factor(value: float) -> None:
    H = hessian_of(8, 50)
    H[2, 5] = value
    factor, damping = damped_factor(H)
    assert factor is None
    assert damping.rung == "not finite"
    assert damping.fallbacks == 1


def test_hopeless_gives_no_factor() -> None:
    H = torch.full((4, 4), 100.0)
    H.diagonal().fill_(1.0)
    factor, damping = damped_factor(H)
    assert factor is None
    assert damping.rung == "not positive"


def test_split_products_lose_no_more_than_their_last_bits() -> None:
    """What an error costs, E H E^T, with an input of huge variance that most of E cancels on."""
    H = hessian_of(150, 400)
    H[3] *= 300
    H[:, 3] *= 300
    E = torch.randn(20, 150, generator=torch.Generator().manual_seed(1)) * 0.1
    a, b = split(E, H)
    assert a.dtype == b.dtype == torch.bfloat16
    exact, found = E.double() @ H.double(), a.double() @ b.double()
    bound = E.double().abs() @ H.double().abs() * 2.0**-15
    assert ((found - exact).abs() <= bound).all()
    coarse = E.bfloat16().double() @ H.bfloat16().double()
    assert (coarse - exact).norm() > 50 * (found - exact).norm()
    torch.testing.assert_close(product(E, H), E @ H, rtol=0, atol=0)


@pytest.mark.gpu
def test_product_on_a_gpu() -> None:
    E, H = torch.randn(200, 700), hessian_of(700, 900)
    exact = E.double() @ H.double()
    error = (product(E.cuda(), H.cuda()).cpu().double() - exact).norm() / exact.norm()
    assert error < 1e-4, error
