"""Fused kernels against the loops that they replace: on a GPU, else in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
pytest.importorskip("triton")

from aptq.core import fused, moves
from aptq.core import sweep as sweep_module
from aptq.core.descent import Quadratic
from aptq.core.grid import Grid
from aptq.core.linalg import damped_factor
from aptq.core.moves import climb, climb_singly, single_moves
from aptq.core.rounding import encode, fit, snap
from aptq.core.stack import StackRule
from aptq.core.sweep import GridRule, Swept, sweep

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MARKS = [pytest.mark.gpu] if GPU else []
pytestmark = MARKS
ROWS, COLUMNS = (500, 1100) if GPU else (64, 150)
GRIDS = ["int4-g32-z", "int2-row-z", "int3-g32", "int4-g20-fz", "int5-g64-z-bf16", "q6_k"]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets the sweep use its kernel wherever the weight lies; undone: nowhere."""

    def use(on: bool) -> None:
        monkeypatch.setattr(sweep_module, "kernels_for", lambda weight: on)

    return use


def problem(columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """Weight [ROWS, columns] and H [columns, columns] of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator)
    mix *= torch.rand(columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) @ (mix / columns**0.5 + 1e-1)
    weight = torch.randn(ROWS, columns, generator=generator)
    return weight.to(DEVICE), (x.T @ x / len(x)).to(DEVICE)


def agreement(one: Swept, two: Swept) -> float:
    return float((one.rounded == two.rounded).float().mean())


@pytest.mark.parametrize("text", GRIDS)
def test_sweep_agrees_in_nearly_all_codes(text: str, kernels) -> None:
    grid = Grid.parse(text)
    weight, H = problem(256 * (4 if GPU else 1) if grid.special else COLUMNS)
    order = H.diagonal().argsort(descending=True)
    factor, _ = damped_factor(H, order=order)
    assert factor is not None
    scales = fit(weight, grid)

    def swept(on: bool) -> Swept:
        kernels(on)
        rule = GridRule(grid, (ROWS, weight.shape[1]), scales)
        return sweep(weight, factor.inner, rule, order=order)

    plain, quick = swept(False), swept(True)
    assert agreement(plain, quick) >= 0.999
    torch.testing.assert_close(quick.loss, plain.loss, rtol=1e-3, atol=0)
    assert (snap(quick.rounded, scales, grid) - quick.rounded).abs().max() < 1e-5
    nearest = snap(weight, scales, grid)
    assert (quick.rounded == nearest).float().mean() < 0.95  # it did feed errors


def test_sweep_agrees_with_scales_fitted_on_the_way(kernels) -> None:
    weight, H = problem()
    factor, _ = damped_factor(H)
    grid, found = Grid("int3", 32, "int"), []
    assert factor is not None
    segments = grid.group_of(COLUMNS).bincount().tolist()
    for on in (False, True):
        kernels(on)
        rule = GridRule(grid, (ROWS, COLUMNS), importance=H.diagonal(), shrink=(1.0, 0.8))
        found.append((sweep(weight, factor.inner, rule, segments=segments), rule.scales()))
    assert agreement(found[0][0], found[1][0]) >= 0.999
    assert (found[0][1].scale == found[1][1].scale).float().mean() >= 0.999


def test_stacked_grids_agree(kernels) -> None:
    weight, H = problem()
    factor, _ = damped_factor(H)
    assert factor is not None
    grids = [Grid.parse(text) for text in ("int4-g32-z", "int2-row-z", "int3-g20-fz", "int8-g64")]
    scales = [fit(weight, grid) for grid in grids]
    found = []
    for on in (False, True):
        kernels(on)
        found.append(sweep(weight.repeat(4, 1), factor.inner, StackRule(grids, scales, COLUMNS)))
    assert agreement(*found) >= 0.999


def test_what_the_kernel_does_not_know_is_asked_of_the_rule(kernels) -> None:
    weight, H = problem()
    factor, _ = damped_factor(H)
    assert factor is not None
    kernels(True)
    rounded = sweep(weight, factor.inner, GridRule(Grid("bf16"), (ROWS, COLUMNS))).rounded
    assert torch.equal(rounded, rounded.bfloat16().float())
    table = Grid("iq4_nl")
    wide = weight[:, :128]
    scales = fit(wide, table)
    half, _ = damped_factor(H[:128, :128])
    rule = GridRule(table, (ROWS, 128), scales)
    assert half is not None
    assert torch.equal(snap(found := sweep(wide, half.inner, rule).rounded, scales, table), found)


# the interpreter cuts numbers to bfloat16 off, where a GPU rounds them
@pytest.mark.parametrize(
    "text", ["int4-g32-z", "int3-g64", "int4-g16-fz", "int2-g128-z" + "-bf16" * GPU]
)
@pytest.mark.parametrize("weighted", ["no", "columns", "entries"])
def test_fit_finds_the_same_ranges(text: str, weighted: str) -> None:
    grid, shares = Grid.parse(text), tuple(1 - 0.1 * i for i in range(6))
    weight = problem(256)[0]
    weight[3, :128] = 0
    weight[4] = weight[4].abs()
    cost = {"no": None, "columns": torch.rand(256), "entries": torch.rand(ROWS, 256)}[weighted]
    cost = None if cost is None else cost.to(DEVICE)
    expected = fit(
        weight.cpu(), grid, importance=None if cost is None else cost.cpu(), shrink=shares
    )
    scale = torch.empty(ROWS, grid.groups(256), dtype=grid.scale_dtype, device=DEVICE)
    zero = None
    if grid.zero != "none":
        zero = torch.empty_like(scale, dtype=torch.uint8 if grid.zero == "int" else scale.dtype)
    assert fused.fits(grid, 256, 2.0)
    root = None if cost is None else cost.sqrt().expand(ROWS, 256)
    least = 2.0**-24 if scale.dtype == torch.float16 else torch.finfo(scale.dtype).tiny
    fused.fit(weight, grid, root, torch.tensor(shares, device=DEVICE), scale, zero, least)
    same = scale.cpu() == expected.scale
    assert same.float().mean() >= 0.995
    if zero is not None:
        assert (zero.cpu() == expected.zero)[same].float().mean() >= 0.999
    assert (scale.cpu() != fit(weight.cpu(), grid).scale).float().mean() > 0  # they shrank


@pytest.mark.parametrize("text", ["int4-g32-z", "int2-g16"])
def test_climb_makes_the_same_moves(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid.parse(text)
    weight, H = problem()
    H += 0.01 * H.diagonal().mean() * torch.eye(COLUMNS, device=DEVICE)
    H[7], H[:, 7] = 0, 0  # an input never seen is left alone
    scales = fit(weight, grid)
    made = Quadratic(weight, H, grid)
    codes = encode(weight, scales, grid).float()
    plain, quick = made.rows(codes.clone(), scales), made.rows(codes.clone(), scales)
    gain = climb(plain, H, single_moves(H, grid.levels - 1))
    monkeypatch.setattr(moves, "kernels_for", lambda _: True)
    won = climb_singly(quick, H, grid.levels - 1)
    torch.testing.assert_close(won, gain, rtol=1e-3, atol=1e-4)
    assert (plain.codes == quick.codes).float().mean() >= 0.99
    assert (quick.codes != codes).any()
    assert torch.equal(quick.codes[:, 7], codes[:, 7])
    loss = made.loss(codes, scales) - made.loss(quick.codes, scales)
    torch.testing.assert_close(won, loss, rtol=1e-3, atol=1e-3)
