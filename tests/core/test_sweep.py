"""Identities of the column loop (GPTQ, arXiv:2210.17323) against plain float64 references."""

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.linalg import damped_factor
from aptq.core.parts import part_of
from aptq.core.rounding import fit, snap
from aptq.core.sweep import GridRule, Swept, sweep

GRIDS = ["int3-row-z", "int4-g16", "int2-g10-z", "int4-g16-fz"]
ROWS, COLUMNS = 9, 150


def problem(columns: int = COLUMNS, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight [ROWS, columns] and the damped Hessian of correlated inputs, float64 [in, in]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ (
        mix * torch.rand(columns, generator=generator) + torch.eye(columns)
    )
    H = (x.T @ x / tokens).double()
    return weight, H + 0.01 * H.diagonal().mean() * torch.eye(columns)


def factor_of(H: Tensor) -> Tensor:
    """float64, so that no value lies within rounding errors of a tie and results can be equal."""
    return torch.linalg.cholesky(torch.linalg.inv(H), upper=True)


def loss_of(rounded: Tensor, weight: Tensor, H: Tensor) -> Tensor:
    """Loss of each row, float64 [out]."""
    error = (rounded - weight).double()
    return ((error @ H) * error).sum(1)


def fixed(weight: Tensor, grid: Grid) -> GridRule:
    return GridRule(grid, (weight.shape[0], weight.shape[1]), fit(weight, grid))


def swept(weight: Tensor, H: Tensor, text: str, block: int = 32) -> Swept:
    return sweep(weight, factor_of(H), fixed(weight, Grid.parse(text)), block=block)


@pytest.mark.parametrize("text", GRIDS)
def test_loss_is_the_quadratic_form_of_the_error(text: str) -> None:
    weight, H = problem()
    result = swept(weight, H, text)
    expected = loss_of(result.rounded, weight, H)
    torch.testing.assert_close(result.row_loss, expected, rtol=1e-9, atol=0)
    assert abs(result.loss / float(expected.sum()) - 1) < 1e-9


@pytest.mark.parametrize("text", GRIDS)
def test_float32_is_enough(text: str) -> None:
    weight, H = problem()
    grid = Grid.parse(text)
    factor, _ = damped_factor(H.float(), 0.0)
    assert factor is not None
    result = sweep(weight, factor.inner, fixed(weight, grid))
    assert result.rounded.dtype == torch.float32
    assert result.loss == pytest.approx(float(loss_of(result.rounded, weight, H).sum()), rel=1e-4)
    assert result.loss == pytest.approx(swept(weight, H, text).loss, rel=0.02)
    assert part_of(result.rounded, fit(weight, grid), grid).dense().equal(result.rounded)


def reference(weight: Tensor, H: Tensor, grid: Grid) -> Tensor:
    """The loop as it is written down in the paper, one column at a time, float64."""
    scales = fit(weight, grid)
    half = torch.full(scales.scale.shape, grid.levels // 2)
    zeros = (half if scales.zero is None else scales.zero).double()
    U = factor_of(H)
    work, rounded = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for column, group in enumerate(grid.group_of(weight.shape[1]).tolist()):
        scale, zero = scales.scale[:, group].double(), zeros[:, group]
        codes = (work[:, column] / scale + zero).round().clamp(0, grid.levels - 1)
        rounded[:, column] = (codes - zero) * scale
        error = (work[:, column] - rounded[:, column]) / U[column, column]
        work[:, column:] -= error[:, None] * U[column, column:]
    return rounded


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("text", GRIDS)
def test_blocked_is_the_plain_loop(text: str, block: int) -> None:
    weight, H = problem()
    grid = Grid.parse(text)
    result = swept(weight, H, text, block)
    torch.testing.assert_close(result.rounded, reference(weight, H, grid), rtol=1e-12, atol=0)


@pytest.mark.parametrize("text", GRIDS)
def test_diagonal_hessian_is_round_to_nearest(text: str) -> None:
    weight, _ = problem()
    grid = Grid.parse(text)
    nearest = snap(weight, fit(weight, grid), grid)
    factors = (torch.full((COLUMNS,), 3.0), torch.rand(COLUMNS) + 0.1)
    for diagonal in factors:
        assert torch.equal(sweep(weight, diagonal.diag(), fixed(weight, grid)).rounded, nearest)


def test_order_with_given_scales_is_the_natural_order_on_permuted_data() -> None:
    weight, H = problem()
    grid = Grid("int3", 0, "int")  # one group: the permuted weight has the same scales
    order = H.diagonal().argsort(descending=True)
    permuted = H[order][:, order]
    there = sweep(weight[:, order], factor_of(permuted), fixed(weight[:, order], grid))
    here = sweep(weight, factor_of(permuted), fixed(weight, grid), order=order)
    assert torch.equal(here.rounded[:, order], there.rounded)
    assert not torch.equal(here.rounded, swept(weight, H, str(grid)).rounded)


def test_order_keeps_the_natural_groups() -> None:
    weight, H = problem()
    grid = Grid("int4", 16, "int")
    order = H.diagonal().argsort(descending=True)
    scales = fit(weight, grid)
    result = sweep(
        weight, factor_of(H[order][:, order]), GridRule(grid, (ROWS, COLUMNS), scales), order=order
    )
    assert torch.equal(snap(result.rounded, scales, grid), result.rounded)
    expected = loss_of(result.rounded, weight, H)
    torch.testing.assert_close(result.row_loss, expected, rtol=1e-9, atol=0)


def test_second_of_two_columns_is_the_optimum() -> None:
    weight, H = problem(columns=2)
    seen: list[Tensor] = []

    class Spy:
        """Rounds to whole numbers and remembers what it was given."""

        def begin(self, columns: Tensor, weight: Tensor) -> None:
            assert columns.tolist() == [0, 1]

        def round(self, column: int, values: Tensor) -> Tensor:
            seen.append(values.clone())
            return values.round()

    result = sweep(weight, factor_of(H), Spy())
    # min over w of the loss with the first error given: H11 (w - w1) + H01 (q0 - w0) = 0
    first = (result.rounded[:, 0] - weight[:, 0]).double()
    best = weight[:, 1].double() - first * H[0, 1] / H[1, 1]
    torch.testing.assert_close(seen[1].double(), best, rtol=1e-4, atol=1e-5)
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    losses = H[1, 1] * (grid - weight[:, 1:]) ** 2 + 2 * H[0, 1] * first[:, None] * (
        grid - weight[:, 1:]
    )
    torch.testing.assert_close(grid[losses.argmin(1)], best, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("segments", [[150], [64, 64, 22], [1, 140, 9], [10] * 15])
@pytest.mark.parametrize("block", [4, 16, 200])
def test_segments_begin_with_compensated_weights(segments: list[int], block: int) -> None:
    weight, H = problem()
    factor, order = factor_of(H), torch.randperm(COLUMNS)
    U = factor.double()
    begun: list[Tensor] = []

    class Check:
        """Compares what begin is shown with the closed form, given all errors so far."""

        def __init__(self) -> None:
            self.rounded = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)

        def begin(self, columns: Tensor, shown: Tensor) -> None:
            begun.append(columns)
            start = sum(len(ids) for ids in begun[:-1])
            error = (self.rounded - weight.double()[:, order])[:, :start]
            # w' = w - E H_done,rest (H_rest,rest)^-1
            Hp = torch.linalg.inv(U.T @ U)
            move = torch.linalg.solve(Hp[start:, start:], Hp[start:, :start] @ error.T)
            expected = weight.double()[:, order].T[start:] - move
            assert torch.equal(columns, order[start : start + len(columns)])
            torch.testing.assert_close(shown.double(), expected[: len(columns)], rtol=0, atol=2e-3)

        def round(self, column: int, values: Tensor) -> Tensor:
            rounded = (values * 2).round() / 2
            self.rounded[:, int((order == column).nonzero())] = rounded.double()
            return rounded

    rule = Check()
    result = sweep(weight, factor, rule, order=order, segments=segments, block=block)
    assert torch.equal(torch.cat(begun), order)
    assert [len(ids) for ids in begun] == segments
    assert torch.equal(result.rounded[:, order].double(), rule.rounded)


def test_scales_fitted_on_the_way() -> None:
    weight, H = problem()
    grid = Grid("int3", 64, "int")
    rule = GridRule(grid, (ROWS, COLUMNS), importance=H.diagonal().float(), shrink=(1.0, 0.9, 0.8))
    result = sweep(weight, factor_of(H), rule, segments=[64, 64, 22])
    scales = rule.scales()
    part = part_of(result.rounded, scales, grid)
    assert torch.equal(part.dense(), result.rounded)
    first = fit(weight[:, :64], grid, importance=H.diagonal().float()[:64], shrink=(1.0, 0.9, 0.8))
    assert torch.equal(scales.scale[:, :1], first.scale)
    torch.testing.assert_close(
        result.row_loss, loss_of(result.rounded, weight, H), rtol=1e-9, atol=0
    )


def test_groups_in_another_order_fitted_on_the_way() -> None:
    weight, H = problem(columns=70)
    grid = Grid("int4", 32)
    order = torch.cat([torch.randperm(6) + 64, torch.randperm(32), torch.randperm(32) + 32])
    importance = torch.rand(ROWS, 70) ** 4
    rule = GridRule(grid, (ROWS, 70), importance=importance, shrink=(1.0, 0.9, 0.8, 0.7))
    result = sweep(weight, factor_of(H[order][:, order]), rule, order=order, segments=[6, 32, 32])
    assert torch.equal(part_of(result.rounded, rule.scales(), grid).dense(), result.rounded)
    first = fit(weight[:, 64:], grid, importance=importance[:, 64:], shrink=rule.shrink)
    assert torch.equal(rule.scales().scale[:, 2:], first.scale)
    with pytest.raises(AssertionError, match="begins in the middle of a segment"):
        sweep(weight, factor_of(H), GridRule(grid, (ROWS, 70)))


def test_dense_grid_changes_only_what_bfloat16_cannot_hold() -> None:
    weight, H = problem()
    grid, weight = Grid("bf16"), (weight * 1e6).bfloat16().float()  # beyond float16
    rule = GridRule(grid, (ROWS, COLUMNS))
    result = sweep(weight, factor_of(H), rule)
    assert torch.equal(result.rounded, weight)
    assert result.loss == 0
    assert part_of(result.rounded, rule.scales(), grid).nbytes == grid.nbytes((ROWS, COLUMNS))


@pytest.mark.parametrize("text", GRIDS)
def test_loses_less_than_round_to_nearest(text: str) -> None:
    weight, H = problem()
    grid = Grid.parse(text)
    nearest = loss_of(snap(weight, fit(weight, grid), grid), weight, H).sum()
    assert swept(weight, H, text).loss < 0.9 * nearest


def test_singular_hessian_finishes() -> None:
    weight, _ = problem()
    x = torch.randn(20, COLUMNS)  # fewer tokens than columns
    x[:, 5] = 0.0
    factor, damping = damped_factor(x.T @ x / 20, 0.01)
    assert factor is not None
    assert damping.dead == 1
    result = sweep(weight, factor.inner, fixed(weight, Grid("int3", 16)))
    assert result.rounded.isfinite().all()
    assert result.loss < float("inf")


def test_inputs_are_left_as_they_were() -> None:
    weight, H = problem()
    factor = factor_of(H)
    kept, same = weight.clone(), factor.clone()
    parameter = torch.nn.Parameter(weight)
    sweep(parameter, factor, fixed(weight, Grid("int3", 16)))
    assert torch.equal(weight, kept)
    assert torch.equal(factor, same)


def first_order(weight: Tensor, H: Tensor, grid: Grid, beta: float) -> Tensor:
    """FOEM (arXiv:2507.11017) from its constrained minimum, solved anew for each column.

    min g d + d H d / 2 over the free columns F, g = beta (w - weight) H_FF, d_0 as rounding wants:
    the part -beta (w - weight) of its solution is applied to the next column only.
    """
    scales = fit(weight, grid)
    work, rounded = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for j in range(weight.shape[1]):
        rounded[:, j : j + 1] = snap(
            work[:, j : j + 1].float(), scales, grid, columns=torch.tensor([j])
        )
        free = H[j:, j:]
        drifted = work[:, j:] - weight[:, j:]
        system = torch.zeros(len(free) + 1, len(free) + 1, dtype=torch.float64)
        system[:-1, :-1], system[-1, 0], system[0, -1] = free, 1, 1
        fixed = (rounded[:, j] - work[:, j])[:, None]
        right = torch.cat([-beta * drifted @ free, fixed], 1)
        move = torch.linalg.solve(system, right.T).T[:, :-1] + beta * drifted
        work[:, j + 1 :] += move[:, 1:]
        work[:, j + 1 : j + 2] -= beta * (work - weight)[:, j + 1 : j + 2]
    return rounded


@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("text", GRIDS)
def test_pulled_columns_are_the_constrained_minimum(text: str, beta: float, block: int) -> None:
    weight, H = problem(columns=30)
    grid = Grid.parse(text)
    found = sweep(weight, factor_of(H), fixed(weight, grid), block=block, pull=beta)
    expected = first_order(weight, H, grid, beta)
    torch.testing.assert_close(found.rounded, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.row_loss, loss_of(found.rounded, weight, H), rtol=1e-9, atol=0)


@pytest.mark.parametrize("text", GRIDS)
def test_a_full_pull_is_round_to_nearest(text: str) -> None:
    weight, H = problem()
    grid = Grid.parse(text)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    factor = factor_of(H[order][:, order])
    nearest = snap(weight, fit(weight, grid), grid).double()
    full = sweep(weight, factor, fixed(weight, grid), order=order, pull=1.0)
    assert torch.equal(full.rounded.float(), nearest.float())
    away = [
        (sweep(weight, factor, fixed(weight, grid), order=order, pull=pull).rounded - weight).norm()
        for pull in (0.0, 0.1, 0.5, 1.0)
    ]
    assert away == sorted(away, reverse=True)
