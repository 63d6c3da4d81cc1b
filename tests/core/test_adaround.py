"""AdaRound's variable: it starts at the weight, rounds to the part, and never leaves [0, 1]."""

import pytest
import torch
from torch import Tensor

from aptq.core.adaround import annealed, between, logits_of, rectified, undecided
from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.rounding import Scales, code_offset, encode, fit, shrinks
from aptq.core.soft import spread

GRIDS = ["int2-g16-z", "int3-row", "int4-g16-fz", "int8-g16-z"]


def nearest(W: Tensor, grid: Grid, least: float = 1.0) -> Quantized:
    scales = fit(W, grid, shrink=shrinks(least))
    return Quantized.make(encode(W, scales, grid), scales, grid)


def values(codes: Tensor, part: Quantized) -> Tensor:
    """What real-valued codes stand for, in float64."""
    scale, zero = part.scales()
    wide = None if zero is None else spread(zero.double(), part.shape[1], part.grid)
    scaled = spread(scale.double(), part.shape[1], part.grid)
    return (codes - code_offset(wide, part.grid)) * scaled


def random(seed: int = 0) -> Tensor:
    return torch.randn(24, 50, generator=torch.Generator().manual_seed(seed))


def test_logits_and_back() -> None:
    h = torch.linspace(0, 1, 1001)
    assert logits_of(h).isfinite().all()
    torch.testing.assert_close(rectified(logits_of(h)), h, rtol=0, atol=1e-6)
    ends = rectified(torch.tensor([-torch.inf, -9.0, 0.0, 9.0, torch.inf]))
    torch.testing.assert_close(ends, torch.tensor([0, 0, 0.5, 1, 1]))


def test_infinite_logits_get_no_gradient() -> None:
    v = torch.tensor([-torch.inf, torch.inf, 0.1], requires_grad=True)
    rectified(v).sum().backward()
    assert v.grad is not None
    assert v.grad[:2].tolist() == [0, 0]
    assert v.grad[2] > 0


@pytest.mark.parametrize("name", GRIDS)
def test_starts_at_the_clipped_weight(name: str) -> None:
    W, grid = random(), Grid.parse(name)
    part = nearest(W, grid, least=0.6)
    lower, fraction = between(part, W)
    ends = [values(torch.full(W.shape, c), part) for c in (0.0, grid.levels - 1.0)]
    clipped = W.double().clamp(torch.minimum(*ends), torch.maximum(*ends))
    soft = values(lower.double() + rectified(logits_of(fraction)).double(), part)
    assert (soft - clipped).abs().max() < 1e-5
    assert (clipped != W).any()


@pytest.mark.parametrize("name", GRIDS)
def test_rounds_to_the_part_and_leans_where_it_is_not_the_nearest(name: str) -> None:
    W, grid = random(), Grid.parse(name)
    near = nearest(W, grid)
    step = torch.randint(-1, 2, W.shape, generator=torch.Generator().manual_seed(1))
    moved = near.unpacked().int() + step
    codes = moved.clamp(0, grid.levels - 1).to(torch.uint8)
    part = Quantized.make(codes, near.scales(), grid)
    lower, fraction = between(part, W)
    assert torch.equal(lower + (logits_of(fraction) >= 0).to(torch.uint8), codes)
    middle = (fraction - 0.5).abs()
    other = (codes != near.unpacked()) & (fraction != 0) & (fraction != 1)
    assert middle[other].min() > 0.04
    back = torch.where(fraction >= 0.5, lower, lower + 1)  # the first alternative
    towards = (values(back.double(), part) - W).abs() < (values(codes.double(), part) - W).abs()
    assert towards[other].all()


def test_ties_keep_their_side() -> None:
    grid = Grid("int8", 0, "int")
    scales = Scales(torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.uint8))
    W = torch.tensor([[200.5, 201.5, 0.5]])
    for codes in ([200, 201, 0], [201, 202, 1]):
        part = Quantized.make(torch.tensor([codes], dtype=torch.uint8), scales, grid)
        lower, fraction = between(part, W)
        assert (lower + (logits_of(fraction) >= 0)).tolist() == [codes]


def test_undecided() -> None:
    assert undecided(torch.tensor([0.0, 1.0, 1.0]), 7.0) == 0
    assert undecided(torch.tensor([0.5]), 7.0) == 1
    assert undecided(torch.tensor([0.9, 0.5]), 2.0) == pytest.approx((1 - 0.64 + 1) / 2)


def test_beta_falls_after_a_fifth() -> None:
    assert [annealed(step, 10) for step in (0, 1, 2, 6)] == [None, None, 20.0, 11.0]
    assert annealed(9, 10) == pytest.approx(20 - 18 * 7 / 8)
