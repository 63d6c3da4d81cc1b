"""Rows and columns: error feedback for a Hessian that is H_out (x) H_in for every head.

BoA (arXiv:2406.13474): once a row is rounded, its error moves the later rows of its head too;
TurboBoA (arXiv:2602.04929): N rows at a time.  N = 1 is exact OBS on the Kronecker product, N = the
size of a head is plain GPTQ.  Rows of different heads are independent and run in parallel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aptq.core.linalg import damped_factors
from aptq.core.sweep import ColumnRule, Swept, sweep


def head_factors(sides: Tensor, damp: float, *, order: Tensor | None = None) -> tuple[Tensor, int]:
    """Upper U [heads, n, n] float32 with H^-1 = U^T U for every damped H of sides [heads, n, n].

    For outer as for inner sides.  order: LongTensor [heads, n], the visiting order of each head.
    Also returns how many heads needed a rescue; one that cannot be factored gets the identity, so
    that no error is fed along this side.
    """
    found = damped_factors(sides, damp, order)
    eye = torch.eye(sides.shape[1], dtype=torch.float32, device=sides.device)
    factors = [eye if factor is None else factor.inner for factor, _ in found]
    return torch.stack(factors), sum(damping.fallbacks > 0 for _, damping in found)


def sweep_rows(
    weight: Tensor,
    inner: Tensor,
    outer: Tensor,
    rule_of: Callable[[Tensor], ColumnRule],
    *,
    rows: int = 1,
    order: Tensor | None = None,
    row_order: Tensor | None = None,
) -> Swept:
    """Round weight [heads * e, in], each error fed into later columns and later rows of its head.

    inner: U [in, in], or [heads, in, in] with one a head, in the column order `order`; outer: U
    [heads, e, e] in the row order `row_order` (LongTensor [heads, e], rows within the head).
    rule_of(ids) rounds the rows with these ids [n] (LongTensor); scales must be known before the
    sweep.  rows: N, of each head at a time.  Computes in the dtype of `inner`.  The loss is
    sum_h tr(H_out E_h H_in E_h^T) with E = weight - rounded.
    """
    heads, size = outer.shape[:2]
    columns = weight.shape[1]
    assert weight.shape[0] == heads * size, (weight.shape, outer.shape)
    assert rows > 0, rows
    ids = torch.arange(heads * size, device=weight.device).view(heads, size)
    if row_order is not None:
        ids = ids.gather(1, row_order)
    start_values = weight.detach().to(inner.dtype)[ids.flatten()].view(heads, size, columns)
    current, rounded = start_values.clone(), torch.empty_like(start_values)
    lower = outer.to(inner.dtype).mT
    for start in range(0, size, rows):
        now, later = slice(start, start + rows), slice(start + rows, size)
        rounded[:, now] = _round(current[:, now], ids[:, now], inner, rule_of, order)
        step = torch.linalg.solve_triangular(
            lower[:, now, now], current[:, now] - rounded[:, now], upper=False
        )
        current[:, later] -= lower[:, later, now] @ step
    row_loss = _row_loss(start_values - rounded, inner, lower, order)
    result = torch.empty_like(rounded).view(-1, columns)
    result[ids.flatten()] = rounded.view(-1, columns)
    losses = torch.empty_like(row_loss)
    losses[ids.flatten()] = row_loss
    return Swept(result, losses)


def _round(
    values: Tensor,
    ids: Tensor,
    inner: Tensor,
    rule_of: Callable[[Tensor], ColumnRule],
    order: Tensor | None,
) -> Tensor:
    """Column sweep of values [heads, n, in], the rows `ids` [heads, n]."""
    if inner.dim() == 2:
        swept = sweep(values.flatten(0, 1), inner, rule_of(ids.flatten()), order=order)
        return swept.rounded.view_as(values)
    return torch.stack(
        [
            sweep(part, factor, rule_of(names), order=order).rounded
            for part, names, factor in zip(values, ids, inner, strict=True)
        ]
    )


def _row_loss(error: Tensor, inner: Tensor, lower: Tensor, order: Tensor | None) -> Tensor:
    """Squared norms [heads * e] of the rows of U_out^-T E U_in^-1; error [heads, e, in]."""
    if order is not None:
        error = error[..., order]
    white = torch.linalg.solve_triangular(lower, error, upper=False)
    white = torch.linalg.solve_triangular(inner, white, upper=True, left=False)
    losses: Tensor = white.square().sum(-1).flatten()
    return losses
