"""fit, encode, decode, snap against plain float64 references, up to the ends of the range."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.rounding import Scales, decode, encode, fit, shrinks, snap

TEXTS = [
    "int2-g7",
    "int3-row",
    "int4-g8-z",
    "int8-g5-z",
    "int4-g16-fz",
    "int5-g9-bf16",
    "int3-g6-z-bf16",
]


def weight_of(rows: int = 6, columns: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.05


def values_of(scales: Scales, grid: Grid, row: int, group: int) -> Tensor:
    """All values that one group may take, float64 [levels]."""
    codes = torch.arange(grid.levels, dtype=torch.float64)
    zero = grid.levels // 2 if scales.zero is None else scales.zero[row, group].double()
    return (codes - zero) * scales.scale[row, group].double()


@pytest.mark.parametrize("text", TEXTS)
def test_snap_takes_the_nearest_value_of_the_group(text: str) -> None:
    grid, weight = Grid.parse(text), weight_of()
    scales = fit(weight, grid, shrink=(0.8,))
    snapped, ids = snap(weight, scales, grid), grid.group_of(20)
    for row, column in itertools.product(range(6), range(20)):
        values = values_of(scales, grid, row, int(ids[column]))
        best = (values - weight[row, column].double()).abs().min()
        error = (snapped[row, column] - weight[row, column]).double().abs()
        torch.testing.assert_close(error, best, rtol=1e-3, atol=1e-7)
        assert (values - snapped[row, column].double()).abs().min() < 1e-8


@pytest.mark.parametrize("text", ["int4-g8-z", "int3-g8-z-bf16", "int4-g8-fz"])
def test_range_with_zero(text: str) -> None:
    grid, weight = Grid.parse(text), weight_of(5, 20)
    weight[0] = weight[0].abs()  # a group on one side of zero still has zero in its range
    scales = fit(weight, grid, shrink=(0.7,))
    assert scales.zero is not None
    for group, part in enumerate(weight.double().split(8, 1)):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) * 0.7 / (grid.levels - 1)).to(grid.scale_dtype)
        torch.testing.assert_close(scales.scale[:, group], scale, rtol=1e-2, atol=0)
        exact = -low * 0.7 / scales.scale[:, group].double()
        zero = scales.zero[:, group].double()
        assert (zero - exact).abs().max() <= (0.5 + 1e-5 if grid.zero == "int" else 1e-2)


def test_without_zero_the_extreme_weight_falls_on_the_lowest_level() -> None:
    grid, weight = Grid("int4", 8), weight_of(5, 20)
    scales = fit(weight, grid)
    codes = encode(weight, scales, grid)
    for group, part in enumerate(weight.split(8, 1)):
        top = part.abs().argmax(1, keepdim=True)
        extreme = part.gather(1, top)
        assert codes[:, 8 * group :].gather(1, top).eq(0).all()
        expected = (-extreme[:, 0] / 8).half()
        torch.testing.assert_close(scales.scale[:, group], expected, rtol=1e-3, atol=0)
    assert (scales.scale < 0).any()
    assert (scales.scale > 0).any()


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    exponent=st.integers(-30, 30),
    rows=st.integers(1, 4),
    columns=st.integers(1, 30),
    seed=st.integers(0, 50),
)
def test_any_magnitude_gives_usable_scales_and_snap_is_idempotent(
    text: str, exponent: int, rows: int, columns: int, seed: int
) -> None:
    grid = Grid.parse(text)
    weight = weight_of(rows, columns, seed) * 10.0**exponent
    weight[:, : columns // 2] *= weight[:, : columns // 2] > 0
    for shrink in ((1.0,), (1.0, 0.9, 0.5)):
        scales = fit(weight, grid, shrink=shrink)
        assert scales.scale.isfinite().all()
        assert scales.scale.ne(0).all()
        codes = encode(weight, scales, grid)
        assert int(codes.max()) < grid.levels
        snapped = decode(codes, scales, grid)
        assert snapped.isfinite().all()
        assert torch.equal(encode(snapped, scales, grid), codes)


@pytest.mark.parametrize("text", TEXTS)
def test_zero_groups_decode_to_zero_and_zeros_stay_zero(text: str) -> None:
    grid, weight = Grid.parse(text), weight_of()
    weight[2] = 0.0
    weight[:, 3] = 0.0
    scales = fit(weight, grid, shrink=(1.0, 0.8))
    snapped = snap(weight, scales, grid)
    assert snapped[2].eq(0).all()
    assert scales.scale[2].eq(1).all()
    if grid.zero != "float":
        assert snapped[:, 3].eq(0).all()


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("weighted", ["no", "columns", "all"])
@pytest.mark.parametrize("text", ["int3-g8-z", "int2-row", "int4-g7", "int4-g8-fz"])
def test_search_finds_the_best_factor_of_each_group(text: str, weighted: str, power: float) -> None:
    grid, weight = Grid.parse(text), weight_of(7, 20)
    shrink = [1.0, 0.95, 0.85, 0.7, 0.5]
    shape = {"no": None, "columns": (20,), "all": (7, 20)}[weighted]
    generator = torch.Generator().manual_seed(1)
    importance = None if shape is None else torch.rand(shape, generator=generator) ** 4
    factor = 1.0 if importance is None else importance.double()
    tries = [fit(weight, grid, shrink=(p,)) for p in shrink]
    errors = []
    for scales in tries:
        error = (snap(weight, scales, grid) - weight).double().abs() ** power * factor
        size = grid.group or 20
        errors.append(torch.stack([part.sum(1) for part in error.split(size, 1)], 1))
    table = torch.stack(errors)
    found = fit(weight, grid, importance=importance, shrink=shrink, power=power)
    error = (snap(weight, found, grid) - weight).double().abs() ** power * factor
    reached = torch.stack([part.sum(1) for part in error.split(grid.group or 20, 1)], 1)
    torch.testing.assert_close(reached, table.amin(0), rtol=1e-4, atol=0)
    assert len(table.argmin(0).unique()) > 1  # the choice is not the same everywhere


def test_shares_to_try() -> None:
    assert shrinks(1.0) == (1.0,)
    assert shrinks(0.9, 0.05) == pytest.approx((1.0, 0.95, 0.9))
    assert shrinks(0.5)[0] == 1.0
    assert shrinks(0.5)[-1] == pytest.approx(0.5)


def test_search_in_tiles_equals_search_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, weight = Grid("int3", 8, "int"), weight_of(33, 20)
    importance = torch.rand(33, 20)
    whole = fit(weight, grid, importance=importance, shrink=(1.0, 0.8))
    monkeypatch.setattr("aptq.core.rounding.CACHE_TILE", 100)
    tiled = fit(weight, grid, importance=importance, shrink=(1.0, 0.8))
    assert torch.equal(whole.scale, tiled.scale)
    assert whole.zero is not None
    assert tiled.zero is not None
    assert torch.equal(whole.zero, tiled.zero)


def test_a_transposed_weight_gives_the_same_scales() -> None:
    grid, weight = Grid("int3", 8), weight_of(33, 20)
    turned = weight.T.contiguous().T
    for shrink in ((1.0,), (1.0, 0.8, 0.6)):
        assert torch.equal(
            fit(weight, grid, shrink=shrink).scale, fit(turned, grid, shrink=shrink).scale
        )


@pytest.mark.parametrize("text", TEXTS)
def test_some_columns_are_as_in_the_whole(text: str) -> None:
    grid, weight = Grid.parse(text), weight_of()
    scales = fit(weight, grid)
    codes, snapped = encode(weight, scales, grid), snap(weight, scales, grid)
    ids = torch.tensor([19, 3, 4, 12, 0])
    for columns in (ids, slice(5, 13), slice(12, None), slice(1, 20, 3)):
        some = weight[:, columns]
        assert torch.equal(encode(some, scales, grid, columns=columns), codes[:, columns])
        assert torch.equal(
            decode(codes[:, columns], scales, grid, columns=columns), snapped[:, columns]
        )
        assert torch.equal(snap(some, scales, grid, columns=columns), snapped[:, columns])


def test_decode_rounds_once_to_the_wanted_dtype() -> None:
    grid, weight = Grid("int8", 8, "int"), weight_of()
    scales = fit(weight, grid)
    codes = encode(weight, scales, grid)
    exact = decode(codes, scales, grid)
    assert torch.equal(decode(codes, scales, grid, dtype=torch.bfloat16), exact.bfloat16())


def test_float_zeros_that_are_not_whole_give_whole_codes() -> None:
    low = -torch.logspace(-5, 0, 200)
    weight = torch.stack([low, torch.ones(200)], 1)
    for bits in (2, 4, 8):
        grid = Grid(f"int{bits}", 0, "float")
        assert encode(weight, fit(weight, grid), grid)[:, 1].eq(grid.levels - 1).all()


def test_straight_through_gradient() -> None:
    grid = Grid("int3", 8)
    weight = weight_of().requires_grad_()
    scales = fit(weight, grid)
    snapped = snap(weight, scales, grid, ste=True)
    assert torch.equal(snapped.detach(), snap(weight.detach(), scales, grid))
    (snapped * torch.arange(20.0)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(20.0).expand(6, 20))
    assert not snap(weight, scales, grid).requires_grad


def test_dense_grid() -> None:
    grid, weight = Grid("bf16"), weight_of()
    scales = fit(weight, grid)
    assert scales.scale.shape == (6, 0)
    assert torch.equal(snap(weight, scales, grid), weight.bfloat16().float())


def test_full_range_beats_the_usual_symmetric_grid_on_the_extreme() -> None:
    # The usual grid (scale = 2 max / (2^b - 1)) clips a positive extreme by half a step.
    weight = torch.tensor([[0.7, -0.1, 0.2, 0.05]])
    grid = Grid("int3", 0)
    error = (snap(weight, fit(weight, grid), grid) - weight)[0, 0].abs()
    assert error < 1e-3  # what remains is the rounding of the scale to float16
