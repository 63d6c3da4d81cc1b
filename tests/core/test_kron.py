"""The row-and-column sweep equals brute-force OBS on the Kronecker product, and its limits hold."""

import pytest
import torch
from torch import Tensor

from aptq.core import linalg
from aptq.core.grid import Grid
from aptq.core.kron import head_factors, sweep_rows
from aptq.core.rounding import Scales, fit, snap
from aptq.core.sweep import GridRule, sweep

HEADS, SIZE, IN = 3, 5, 7
GRID = Grid("int2", 0, "int")


def spd(count: int, size: int, seed: int) -> Tensor:
    x = torch.randn(
        count, 4 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x[:, :, 1:] += 0.8 * x[:, :, :-1]  # correlated, or there is nothing to feed back
    return x.mT @ x / (4 * size)


def upper(H: Tensor) -> Tensor:
    """U with H^-1 = U^T U."""
    return torch.linalg.cholesky(torch.linalg.inv(H), upper=True)


def weights(seed: int = 3) -> Tensor:
    return torch.randn(
        HEADS * SIZE, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def rules(W: Tensor):
    scales = fit(W.float(), GRID)

    def rule_of(ids: Tensor) -> GridRule:
        zero = None if scales.zero is None else scales.zero[ids]
        return GridRule(GRID, (len(ids), IN), Scales(scales.scale[ids], zero))

    return rule_of


def brute(W: Tensor, inner: Tensor, outer: Tensor, row_order: Tensor | None = None) -> Tensor:
    """OBS, one weight after the other: the rest takes up the error along the inverse Hessian."""
    rule_of = rules(W)
    rounded = torch.empty_like(W)
    for head in range(HEADS):
        rows = torch.arange(SIZE) if row_order is None else row_order[head]
        ids = head * SIZE + rows
        H = torch.kron(outer[head][rows][:, rows], inner if inner.dim() == 2 else inner[head])
        w = W[ids].flatten().clone()
        inverse = torch.linalg.inv(H)
        for at in range(len(w)):
            row, column = divmod(at, IN)
            rule = rule_of(ids[row : row + 1])
            q = rule.round(column, w[at : at + 1].clone())[0]
            rounded[ids[row], column] = q
            w = w - (w[at] - q) / inverse[at, at] * inverse[:, at]
            inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    return rounded


def loss(E: Tensor, inner: Tensor, outer: Tensor) -> float:
    parts = E.view(HEADS, SIZE, IN)
    return float(torch.einsum("hij,hjk,kl,hil->", outer, parts, inner, parts))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_one_row_at_a_time_is_brute_force(order: bool, per_head: bool) -> None:
    W, outer = weights(), spd(HEADS, SIZE, 0)
    inner = spd(HEADS, IN, 1) if per_head else spd(1, IN, 1)[0]
    row_order = outer.diagonal(dim1=1, dim2=2).argsort(1, descending=True) if order else None
    ordered = outer
    if row_order is not None:
        ordered = torch.stack([m[r][:, r] for m, r in zip(outer, row_order, strict=True)])
    found = sweep_rows(W, upper(inner), upper(ordered), rules(W), rows=1, row_order=row_order)
    torch.testing.assert_close(found.rounded, brute(W, inner, outer, row_order))


def test_column_order() -> None:
    W, outer, inner = weights(), spd(HEADS, SIZE, 0), spd(1, IN, 1)[0]
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    found = sweep_rows(W, upper(inner[order][:, order]), upper(outer), rules(W), order=order)
    permuted = W[:, order]
    expected = brute(permuted, inner[order][:, order], outer)  # one scale a row: order is free
    torch.testing.assert_close(found.rounded[:, order], expected)
    assert found.loss == pytest.approx(loss(W - found.rounded, inner, outer), rel=1e-9)


def test_a_whole_head_at_a_time_is_gptq() -> None:
    W, outer, inner = weights(), spd(HEADS, SIZE, 0), spd(1, IN, 1)[0]
    found = sweep_rows(W, upper(inner), upper(outer), rules(W), rows=SIZE)
    plain = sweep(W, upper(inner), rules(W)(torch.arange(len(W))))
    assert torch.equal(found.rounded, plain.rounded)


@pytest.mark.parametrize("rows", [1, 2, 3, SIZE])
def test_rows_that_do_not_interact_are_gptq_and_the_loss_is_the_quadratic_form(rows: int) -> None:
    W, outer, inner = weights(), spd(HEADS, SIZE, 0), spd(1, IN, 1)[0]
    plain = sweep(W, upper(inner), rules(W)(torch.arange(len(W))))
    diagonal = torch.diag_embed(outer.diagonal(dim1=1, dim2=2))
    found = sweep_rows(W, upper(inner), upper(diagonal), rules(W), rows=rows)
    assert torch.equal(found.rounded, plain.rounded)
    found = sweep_rows(W, upper(inner), upper(outer), rules(W), rows=rows)
    assert found.loss == pytest.approx(loss(W - found.rounded, inner, outer), rel=1e-9)
    assert found.loss == pytest.approx(float(found.row_loss.sum()), rel=1e-9)


def test_row_feedback_beats_gptq_beats_rounding() -> None:
    ratios = []
    for seed in range(8):
        W, outer, inner = weights(seed), spd(HEADS, SIZE, seed + 20), spd(1, IN, seed + 40)[0]
        found = [
            loss(
                W - sweep_rows(W, upper(inner), upper(outer), rules(W), rows=rows).rounded,
                inner,
                outer,
            )
            for rows in (1, SIZE)
        ]
        nearest = snap(W.float(), fit(W.float(), GRID), GRID).double()
        ratios.append((found[0] / found[1], found[1] / loss(W - nearest, inner, outer)))
    boa, gptq = torch.tensor(ratios).log().mean(0).exp()
    assert boa < 0.95
    assert gptq < 0.95


def test_head_factors_inverts_and_counts_rescues() -> None:
    outer = spd(2, SIZE, 0).float()
    order = outer.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    U, fallbacks = head_factors(outer, 0.0, order=order)
    ordered = torch.stack([m[r][:, r] for m, r in zip(outer, order, strict=True)])
    torch.testing.assert_close(
        U.mT @ U @ ordered, torch.eye(SIZE).expand(2, -1, -1), rtol=0, atol=1e-3
    )
    assert fallbacks == 0
    bad = torch.stack([outer[0], torch.full((SIZE, SIZE), torch.nan)])
    U, fallbacks = head_factors(bad, 0.0)
    assert torch.equal(U[1], torch.eye(SIZE))
    assert fallbacks == 1


def test_head_factors_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of one size go to the batch; the one that fails there climbs and is counted."""
    alone = list[Tensor]()
    plain = linalg.damped_factor

    def counted(hessian: Tensor, *rest: object, **more: object) -> object:
        alone.append(hessian)
        return plain(hessian, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(linalg, "damped_factor", counted)
    outer = spd(5, SIZE, 0).float()
    outer[3] = 1.0
    U, fallbacks = head_factors(outer, 0.0)
    assert fallbacks == 1
    assert [int(one[0, 1] == one[0, 0]) for one in alone] == [1]
    good = [0, 1, 2, 4]
    unit = U[good].mT @ U[good] @ outer[good]
    torch.testing.assert_close(unit, torch.eye(SIZE).expand(4, -1, -1), rtol=0, atol=1e-3)
