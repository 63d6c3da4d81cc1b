"""Differentiable rounding: the same levels as the plain one, with the gradients of the papers."""

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.rounding import Scales, encode, fit, level_of
from aptq.core.soft import (
    LEAN,
    cast_ste,
    clamp_ste,
    closed,
    extremes,
    level,
    opened,
    round_ste,
    spread,
    stored_scale,
    stored_zero,
)

GRIDS = ["int2-g16-z", "int3-g7", "int4-row-fz", "int8-g64-fz-bf16", "int2-row", "int5-g16-bf16"]


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def part_on(grid: Grid, columns: int = 40, seed: int = 0) -> tuple[Quantized, Tensor]:
    """A part with random codes on scales of its weight, and the weight, which is far from it."""
    weight = random(6, columns, seed)
    scales = fit(weight, grid, shrink=(0.7,))
    if scales.zero is not None and grid.zero == "float":
        scales = Scales(scales.scale, (scales.zero + 0.37).clamp(0, grid.levels - 1))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.levels, weight.shape, generator=generator, dtype=torch.uint8)
    return Quantized.make(codes, scales, grid), weight


@pytest.mark.parametrize("leaning", [False, True])
@pytest.mark.parametrize("columns", [40, 5])
@pytest.mark.parametrize("name", GRIDS)
def test_opened_and_closed_is_the_same_part(name: str, columns: int, leaning: bool) -> None:
    part, weight = part_on(Grid.parse(name), columns)
    again = closed(*opened(part, weight if leaning else None), part.grid)
    assert torch.equal(again.unpacked(), part.unpacked())
    for key, value in part.tensors().items():
        assert torch.equal(again.tensors()[key], value), key


def test_latents_lean_towards_the_weight() -> None:
    part, weight = part_on(Grid.parse("int3-g16-z"))
    plain, scales = opened(part)
    lean, _ = opened(part, weight)
    exact = weight / spread(scales.scale, 40, part.grid)
    near = (exact - plain).abs() <= LEAN
    assert 0 < near.float().mean() < 1
    torch.testing.assert_close(lean[near], exact[near])
    torch.testing.assert_close((lean - plain)[~near], LEAN * (exact - plain)[~near].sign())


@pytest.mark.parametrize("name", GRIDS)
def test_level_is_that_of_plain_rounding(name: str) -> None:
    """Ties and values beyond the ends included."""
    grid = Grid.parse(name)
    latent = torch.cat([20 * random(6, 30), torch.arange(-15.0, 15).div(2).expand(6, 30)], 1)
    zero = None if grid.zero == "none" else random(6, 60, 1).abs().mul(2).clamp(max=3)
    if grid.zero == "int" and zero is not None:
        zero = zero.round()
    assert torch.equal(level(latent, zero, grid), level_of(latent.clone(), zero, grid))


@pytest.mark.parametrize("name", GRIDS)
def test_closed_rounds_as_encode_does(name: str) -> None:
    grid = Grid.parse(name)
    weight = random(6, 40)
    scales = fit(weight, grid)
    wide = Scales(scales.scale.float(), None if scales.zero is None else scales.zero.float())
    made = closed(weight / spread(wide.scale, 40, grid), wide, grid)
    assert torch.equal(made.unpacked(), encode(weight, scales, grid))


@pytest.mark.parametrize("name", ["int4-g16", "int4-g16-bf16"])
def test_stored_scale_is_what_is_stored(name: str) -> None:
    """At every magnitude and sign, bit for bit, though it carries a gradient."""
    grid = Grid.parse(name)
    sizes = torch.logspace(-44, 38, 2000).float()
    scale = torch.cat([sizes, -sizes]).view(1, -1).requires_grad_()
    found = stored_scale(scale, grid)
    assert torch.equal(found, found.to(grid.scale_dtype).float())
    assert (found != 0).all()
    assert found.isfinite().all()
    assert torch.equal(found.sign(), scale.sign())
    usual = (scale.abs() > 1e-3) & (scale.abs() < 1e3)
    assert torch.equal(found[usual], scale[usual].to(grid.scale_dtype).float())
    found.sum().backward()
    assert scale.grad is not None
    assert (scale.grad == 1).all()


def test_stored_zero_is_what_is_stored() -> None:
    zero = (300 * random(4, 50)).requires_grad_()
    for name in ("int4-g16-z", "int4-g16-fz", "int4-g16-fz-bf16"):
        grid = Grid.parse(name)
        found = stored_zero(zero, grid)
        assert found is not None
        bound = zero.detach().clamp(0, 15)
        kind = grid.scale_dtype
        wanted = bound.round() if grid.zero == "int" else bound.to(kind).float()
        assert torch.equal(found, wanted)
    assert stored_zero(None, Grid.parse("int4-g16")) is None


def test_gradients_pass_straight_through() -> None:
    x = (50 * random(3, 40)).requires_grad_()
    weight = random(3, 40, 1)
    for value, wanted in (
        (round_ste(x), x.detach().round()),
        (clamp_ste(x, 0, 15), x.detach().clamp(0, 15)),
        (cast_ste(x, torch.float16), x.detach().half().float()),
    ):
        (grad,) = torch.autograd.grad((value * weight).sum(), x)
        assert torch.equal(value, wanted)
        assert torch.equal(grad, weight)


def test_gradients_of_weight_scale_and_zero() -> None:
    """arXiv:2407.11062: dQ/dW = 1 or 0, dQ/ds = round(u) - u or c - z, dQ/dz = 0 or -s."""
    grid = Grid("int2", 0, "int")
    W = torch.tensor([[-0.9, -0.33, 0.05, 0.2, 0.6, 1.4]], requires_grad=True)
    s = torch.tensor([[0.3]], requires_grad=True)
    z = torch.tensor([[1.0]], requires_grad=True)
    u = W.detach() / 0.3
    code = u.round() + 1
    inside = (code >= 0) & (code <= 3)
    assert inside.tolist() == [[False, True, True, True, True, False]]
    for column in range(6):
        q = level(W / spread(s, 6, grid), spread(z, 6, grid), grid) * spread(s, 6, grid)
        dW, ds, dz = torch.autograd.grad(q[0, column], (W, s, z))
        bound = float(code[0, column].clamp(0, 3))
        free = bool(inside[0, column])
        rounding = float(u[0, column].round() - u[0, column])
        assert float(dW[0, column]) == pytest.approx(1.0 if free else 0.0)
        assert float(dW.abs().sum()) == pytest.approx(1.0 if free else 0.0)
        assert float(ds) == pytest.approx(rounding if free else bound - 1, abs=1e-6)
        assert float(dz) == pytest.approx(0.0 if free else -0.3)


@pytest.mark.parametrize("size", [0, 7, 16, 64])
def test_extremes_and_spread(size: int) -> None:
    grid = Grid("int4", size, "int")
    weight = random(3, 40) + torch.tensor([[0.0], [9.0], [-9.0]])
    low, high = extremes(weight, grid)
    groups = weight.split(size or 40, 1)
    assert torch.equal(low, torch.stack([g.amin(1).clamp(max=0) for g in groups], 1))
    assert torch.equal(high, torch.stack([g.amax(1).clamp(min=0) for g in groups], 1))
    assert torch.equal(spread(high, 40, grid), high[:, grid.group_of(40)])
