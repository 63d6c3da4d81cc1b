"""Many factors at once: those that `damped_factor` makes one by one, and the ladder behind."""

import pytest
import torch
from torch import Tensor

from aptq.core import linalg
from aptq.core.linalg import BATCH_BYTES, batch_count, damped_factor, damped_factors
from tests.core.test_linalg import damped, hessian_of


def mixed(columns: int) -> Tensor:
    """[6, columns, columns]: good, singular, not finite, dead and noisy columns, unseen, tilted."""
    found = torch.stack([hessian_of(columns, 4 * columns, seed) for seed in range(6)])
    found[1] = 1.0
    found[2, 1, 0] = torch.nan
    found[3, 2], found[3, :, 2], found[3, 4, 4] = 0.0, 0.0, -1e-3
    found[4] = 0.0
    skew = torch.randn(columns, columns, generator=torch.Generator().manual_seed(2))
    found[5] += skew - skew.T
    return found


def orders_of(count: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(columns, generator=generator) for _ in range(count)])


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("ordered", [False, True])
def test_many_factors_are_those_of_one_after_another(
    damp: float, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ladder is climbed by those alone that need it: the singular and the one with NaN."""
    H, alone = mixed(37), list[int]()
    before, orders = H.clone(), orders_of(6, 37) if ordered else None
    ways = [None] * 6 if orders is None else list(orders)
    expected = [damped_factor(one, damp, order=way) for one, way in zip(H, ways, strict=True)]

    def counted(hessian: Tensor, *rest: object, **more: object) -> object:
        alone.append(next(n for n, one in enumerate(H) if one.data_ptr() == hessian.data_ptr()))
        return damped_factor(hessian, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(linalg, "damped_factor", counted)
    for given in (H, list(H)):
        alone.clear()
        found = damped_factors(given, damp, orders)
        assert alone == ([2] if damp else [1, 2])
        assert [damping for _, damping in found] == [damping for _, damping in expected]
        for (one, _), (other, _) in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.equal(one.inner, one.inner.triu())
                assert one.inner.is_contiguous()
                assert one.inner.untyped_storage().nbytes() == 4 * 37 * 37  # nothing else is held
                torch.testing.assert_close(one.inner, other.inner, rtol=2e-3, atol=2e-4)
    assert torch.equal(H.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("columns", [1, 2, 64, 128])
def test_many_factors_of_the_inverse(columns: int) -> None:
    H = torch.stack([hessian_of(columns, 4 * columns, seed) for seed in range(5)])
    orders = orders_of(5, columns)
    assert batch_count(columns, H.device) > 1
    for one, order, (factor, damping) in zip(
        H, orders, damped_factors(H, 0.01, orders), strict=True
    ):
        assert factor is not None
        assert damping == linalg.Damping(0.01, 0.0, 0, 0, "cholesky")
        U = factor.inner.double()
        found = U.T @ U @ damped(one, 0.01)[order][:, order]
        torch.testing.assert_close(found, torch.eye(columns).double(), rtol=0, atol=2e-3)


def test_batches_take_little_memory_and_large_matrices_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert batch_count(129, cpu) == batch_count(2049, gpu) == 1
    assert 4 * 2048**2 * batch_count(2048, gpu) == BATCH_BYTES == 256 << 20
    H, sizes, plain = mixed(20), list[int](), linalg._first_rung

    def counted(hessians: Tensor, *rest: object) -> object:
        sizes.append(len(hessians))
        return plain(hessians, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(linalg, "_first_rung", counted)
    whole = damped_factors(H, 0.01, orders_of(6, 20))
    monkeypatch.setattr(linalg, "BATCH_BYTES", 4 * 4 * 20**2)
    cut = damped_factors(H, 0.01, orders_of(6, 20))
    assert sizes == [6, 4, 2]
    assert [damping for _, damping in cut] == [damping for _, damping in whole]
    for (one, _), (other, _) in zip(cut, whole, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one.inner, other.inner)
    monkeypatch.setattr(linalg, "BATCH_BYTES", 0)
    assert [damping for _, damping in damped_factors(H)] == [d for _, d in whole]
    assert sizes == [6, 4, 2]
    assert damped_factors([]) == []


def test_what_the_batch_reports_as_failed_climbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library leaves in place of the factor."""
    H, alone, plain = mixed(20), list[int](), torch.linalg.cholesky_ex
    expected = damped_factors(H)

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = plain(matrix)
        if matrix.dim() == 3:
            info[3] = 7
        else:
            alone.append(len(matrix))
        return factor, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    found = damped_factors(H)
    assert alone == [20]  # the one with NaN has no Cholesky
    assert [damping for _, damping in found] == [damping for _, damping in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [64, 300, 768])
def test_many_factors_on_a_gpu(columns: int) -> None:
    H, orders = mixed(columns), orders_of(6, columns)
    expected = [damped_factor(one, order=way) for one, way in zip(H, orders, strict=True)]
    found = damped_factors(H.cuda(), 0.01, orders.cuda())
    assert [damping for _, damping in found] == [damping for _, damping in expected]
    for number, (factor, _) in enumerate(found):
        assert (factor is None) == (number == 2)
        if factor is not None and number in (0, 5):
            U, order = factor.inner.cpu().double(), orders[number]
            unit = U.T @ U @ damped(H[number], 0.01)[order][:, order]
            torch.testing.assert_close(unit, torch.eye(columns).double(), rtol=0, atol=1e-2)
