"""Coordinate descent on codes against enumeration, brute force and autograd, mostly in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from aptq.core.descent import Mode, Quadratic, descend, improve, refit, scale_steps
from aptq.core.grid import Grid
from aptq.core.linalg import damped_factor
from aptq.core.moves import climb, cycle, pair_moves, single_moves
from aptq.core.parts import Quantized
from aptq.core.rounding import Scales, encode, fit, snap
from aptq.core.sweep import GridRule, sweep

# the last group of 16 out of 40 columns has 8; scales without a zero may be negative
GRIDS = ["int2-g16-z", "int3-g16", "int3-g16-fz", "int4-row-z-bf16"]
ROWS, COLUMNS = 12, 40


def problem(
    text: str, *, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0, dtype=torch.float64
) -> tuple[Quadratic, Tensor, Scales]:
    """Correlated inputs, and the nearest codes on the min-max grid."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(300, columns, generator=generator) @ (mix + torch.eye(columns))
    H = (x.T @ x / 300).to(dtype)
    H += 0.01 * H.diagonal().mean() * torch.eye(columns, dtype=dtype)
    W, grid = torch.randn(rows, columns, generator=generator), Grid.parse(text)
    scales = fit(W, grid)
    return Quadratic(W.to(dtype), H, grid), encode(W, scales, grid), scales


def compensated(made: Quadratic, scales: Scales) -> Tensor:
    """GPTQ's codes on the same grid."""
    W, H, grid = made
    order = H.diagonal().argsort(descending=True)
    factor, _ = damped_factor(H.float(), 0.0, order=order)
    assert factor is not None
    rule = GridRule(grid, (W.shape[0], W.shape[1]), scales)
    return encode(sweep(W.float(), factor.inner, rule, order=order).rounded, scales, grid)


def total(made: Quadratic, codes: Tensor, scales: Scales) -> float:
    return float(made.loss(codes.to(made.H.dtype), scales).sum())


@pytest.mark.parametrize("text", GRIDS)
def test_float_codes_decode_as_stored_ones(text: str) -> None:
    made, codes, scales = problem(text, dtype=torch.float32)
    dense = Quantized.make(codes, scales, made.grid).dense()
    assert torch.equal(made.error(codes.float(), scales), dense - made.weight)


@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("mode", ["cyclic", "greedy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_gets_worse_and_gptq_gets_better(text: str, mode: Mode, dtype: torch.dtype) -> None:
    made, codes, scales = problem(text, dtype=dtype)
    for start in (codes, compensated(made, scales)):
        found = descend(made, start, scales, mode=mode, pairs=True)
        exact = made._replace(weight=made.weight.double(), H=made.H.double())
        before, after = (
            exact.loss(c.double(), s) for c, s in ((start, scales), (found.codes, found.scales))
        )
        assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < 0.97 * before.sum()
        torch.testing.assert_close(found.loss.double(), after, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.start.double(), before, rtol=1e-4, atol=1e-6)
        assert int(found.codes.max()) < made.grid.levels
        stored = Quantized.make(found.codes, found.scales, made.grid).dense()
        error = found.codes.to(dtype), found.scales
        torch.testing.assert_close(stored.to(dtype), made.error(*error) + made.weight)


@pytest.mark.parametrize("text", GRIDS)
def test_gains_add_up_to_the_change_of_the_loss(text: str) -> None:
    made, codes, scales = problem(text)
    top = made.grid.levels - 1
    for move in ("cycle", "single", "pair"):
        moved = codes.double()
        rows = made.rows(moved, scales)
        if move == "cycle":
            gain = cycle(rows, made.H, top, panel=7)
        else:
            propose = (single_moves if move == "single" else pair_moves)(made.H, top)
            gain = climb(rows, made.H, propose)
        change = made.loss(codes.double(), scales) - made.loss(moved, scales)
        assert (gain > 0).all()
        torch.testing.assert_close(gain, change, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(rows.residual, made.rows(moved, scales).residual)


def plain_cycle(made: Quadratic, codes: Tensor, scales: Scales) -> Tensor:
    """One sweep as the paper has it: the minimiser of each column, all others as they are."""
    codes, step, H = codes.double(), made.each(scales.scale), made.H
    offset = codes - made.levels(codes, scales)
    for j in range(len(H)):
        Q = (codes - offset) * step
        others = (Q - made.weight) @ H[:, j] - (Q - made.weight)[:, j] * H[j, j]
        u = made.weight[:, j] - others / H[j, j]
        new = (u / step[:, j] + offset[:, j]).round().clamp(0, made.grid.levels - 1)
        codes[:, j] = new
    return codes


@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("panel", [1, 7, 128, COLUMNS])
def test_panels_are_the_plain_sweep(text: str, panel: int) -> None:
    made, codes, scales = problem(text)
    moved = codes.double()
    cycle(made.rows(moved, scales), made.H, made.grid.levels - 1, panel=panel)
    assert torch.equal(moved, plain_cycle(made, codes, scales))
    assert not torch.equal(moved, codes.double())


@pytest.mark.parametrize("text", GRIDS)
def test_first_greedy_move_is_the_best_of_all(text: str) -> None:
    """Every code of every column is tried."""
    made, _, scales = problem(text, rows=3, columns=9)
    levels = made.grid.levels
    codes = torch.randint(levels, (3, 9), generator=torch.Generator().manual_seed(0))
    gain, at, moves = single_moves(made.H, levels - 1)(made.rows(codes.double(), scales))
    loss = made.loss(codes.double(), scales)
    for row in range(3):
        best = (0.0, 0, 0)
        for j, code in itertools.product(range(9), range(levels)):
            tried = codes.double()
            tried[row, j] = code
            won = float((loss - made.loss(tried, scales))[row])
            if won > best[0] + 1e-12:
                best = (won, j, code - int(codes[row, j]))
        if best[0] == 0:
            best = (0.0, int(at[row]), 0)
        assert best == (pytest.approx(float(gain[row]), rel=1e-4), int(at[row]), int(moves[row]))


@pytest.mark.parametrize("text", GRIDS)
def test_pairs_are_the_best_of_all_pairs_where_no_single_move_gains(text: str) -> None:
    found = 0
    for seed in range(6):
        made, codes, scales = problem(text, rows=3, columns=9, seed=seed)
        top = made.grid.levels - 1
        still = improve(made, codes.double(), scales, "greedy", 20)
        gain, at, moves = pair_moves(made.H, top)(made.rows(still, scales))
        loss = made.loss(still, scales)
        best = torch.zeros(3, dtype=torch.float64)
        for i, k, a, b in itertools.product(range(9), range(9), (-1, 1), (-1, 1)):
            tried = still.clone()
            tried[:, i] += a
            tried[:, k] += b * (i != k)
            inside = ((tried >= 0) & (tried <= top)).all(1)
            best = torch.maximum(best, (loss - made.loss(tried, scales)).where(inside, 0))
        torch.testing.assert_close(gain, best, rtol=1e-5, atol=1e-8)
        moved = still.scatter_add(1, at, moves)
        torch.testing.assert_close(loss - made.loss(moved, scales), gain, rtol=1e-5, atol=1e-8)
        found += int((gain > 0).sum())
    assert found > 0


def test_enumeration_of_four_codes() -> None:
    """Never below the optimum, still at the optimum, and more often there with pairs."""
    left = {False: 0, True: 0}
    for seed in range(40):
        made, codes, scales = problem("int2-row-z", rows=1, columns=4, seed=seed)
        codes = torch.randint(4, (1, 4), generator=torch.Generator().manual_seed(seed))
        every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float64)
        wide = Scales(scales.scale.expand(256, 1), scales.zero.expand(256, 1))
        losses = made._replace(weight=made.weight.expand(256, 4)).loss(every, wide)
        optimum = every[losses.argmin()][None].to(torch.uint8)
        assert torch.equal(descend(made, optimum, scales, rounds=0, pairs=True).codes, optimum)
        for pairs in left:
            found = descend(made, codes, scales, rounds=0, pairs=pairs)
            assert found.loss >= losses.min() - 1e-12
            left[pairs] += int(not torch.equal(found.codes, optimum))
    assert left[True] < left[False] < 30


@pytest.mark.parametrize("mode", ["cyclic", "greedy"])
@pytest.mark.parametrize("text", GRIDS)
def test_nearest_codes_stay_where_inputs_are_independent(text: str, mode: Mode) -> None:
    made, codes, scales = problem(text)
    diagonal = (torch.rand(COLUMNS, dtype=torch.float64) + 0.1).diag()
    diagonal[5, 5] = 0  # an input never seen is left alone
    found = descend(made._replace(H=diagonal), codes, scales, mode=mode, rounds=0, pairs=True)
    assert torch.equal(found.codes, codes)


@pytest.mark.parametrize("text", GRIDS)
def test_gradient_of_the_scales_vanishes(text: str) -> None:
    made, codes, scales = problem(text)
    codes = codes.double()
    codes[0, :16] -= made.levels(codes, scales)[0, :16]  # a group without levels stays as it is
    step = scale_steps(made, codes, scales)
    scale = (scales.scale.double() + step).requires_grad_()
    grid = made.grid
    (made.loss(codes, scales._replace(scale=scale)).sum()).backward()
    start = scales.scale.double().requires_grad_()
    made.loss(codes, scales._replace(scale=start)).sum().backward()
    assert scale.grad is not None
    assert start.grad is not None
    live = start.grad.abs() > 0
    assert (scale.grad.abs() < 1e-9 * start.grad.abs().max()).all()
    assert live.sum() >= ROWS * grid.groups(COLUMNS) - 1


@pytest.mark.parametrize("text", GRIDS)
def test_refitted_scales_are_stored_and_never_worse(text: str) -> None:
    made, codes, scales = problem(text)
    codes = improve(made, codes.double(), scales, "greedy", 20)
    before = made.loss(codes, scales)
    found = refit(made, codes, scales, before)
    assert found.scale.dtype == made.grid.scale_dtype
    assert torch.equal(found.scale.sign(), scales.scale.sign())
    after = made.loss(codes, found)
    assert (after <= before).all()
    assert after.sum() < before.sum()
    same = refit(made, codes, scales, after)  # no better than that
    assert torch.equal(same.scale, scales.scale)
    turned = refit(made, codes, Scales(-scales.scale, scales.zero), torch.full_like(before, 1e9))
    assert torch.equal(turned.scale.sign(), -scales.scale.sign())  # though the best has the other


def test_scales_pay_beyond_codes() -> None:
    made, _, scales = problem("int3-g16-z")
    codes = compensated(made, scales)
    moved = descend(made, codes, scales, rounds=0)
    both = descend(made, codes, scales)
    assert both.loss.sum() < 0.97 * moved.loss.sum()
    nearest = snap(made.weight.float(), scales, made.grid)
    worst = descend(made, encode(nearest, scales, made.grid), scales, rounds=0)
    assert moved.loss.sum() < worst.loss.sum()
