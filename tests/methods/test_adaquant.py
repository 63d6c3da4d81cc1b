"""AdaQuant: starts at the codes it is given, follows the gradient, never ends above its start."""

import pytest
import torch

from aptq.core.descent import Quadratic
from aptq.core.parts import Quantized
from aptq.methods.reconstruct.adaquant import AdaQuant, Soft
from aptq.stats.hessian import Hessian
from tests.methods.refine import layer

GRIDS = ["int2-g16-z", "int3-g16", "int3-g7-fz", "int4-row-z-bf16"]


def started(grid: str, stage: AdaQuant, after: str = "gptq") -> tuple[Quadratic, Quantized]:
    made = layer(grid, stage.needs()[0], after=after)
    part = made.parts[0]
    assert isinstance(part, Quantized)
    problem = stage.problem(made, part.grid)
    assert problem is not None
    return problem, part


def losses(problem: Quadratic, part: Quantized) -> torch.Tensor:
    return problem.loss(part.unpacked().float(), part.scales())


@pytest.mark.parametrize("after", ["gptq", "rtn"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_walk_starts_at_the_earlier_codes(grid: str, after: str) -> None:
    stage = AdaQuant()
    problem, part = started(grid, stage, after)
    codes, scales, loss = next(stage.walk(problem, part))
    assert torch.equal(codes, part.unpacked())
    assert torch.equal(scales.scale, part.scale)
    torch.testing.assert_close(loss, losses(problem, part), rtol=1e-4, atol=1e-6)
    same = AdaQuant(steps=0).refine(problem, part)
    assert torch.equal(same.codes, part.codes)


@pytest.mark.parametrize("options", [{}, {"drift": 1.0}, {"weights": 0.5, "scales": 0.5}], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_no_row_ends_above_its_start(grid: str, options: dict[str, float]) -> None:
    stage = AdaQuant(**options)  # type: ignore[arg-type]
    for after in ("gptq", "rtn"):
        problem, part = started(grid, stage, after)
        before, after_it = losses(problem, part), losses(problem, stage.refine(problem, part))
        assert (after_it <= before * (1 + 1e-5)).all()
        if after == "rtn" and not options:
            assert after_it.sum() < 0.9 * before.sum()


def test_weights_help_beyond_scales() -> None:
    """From nearest rounding: start > scales and zeros > those and weights."""
    stage = AdaQuant()
    problem, part = started("int3-g16-z", stage, "rtn")
    scales = AdaQuant(weights=0.0).refine(problem, part)
    found = [float(losses(problem, x).sum()) for x in (part, scales, stage.refine(problem, part))]
    assert found[2] < found[1] < found[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_reported_losses_are_those_of_what_is_stored(grid: str) -> None:
    stage = AdaQuant(steps=5, weights=0.05, scales=0.02, zeros=0.1)
    problem, part = started(grid, stage)
    for codes, scales, loss in stage.walk(problem, part):
        made = Quantized.make(codes, scales, part.grid)
        torch.testing.assert_close(loss, losses(problem, made), rtol=1e-4, atol=1e-5)
    assert not torch.equal(scales.scale, part.scale)
    assert not torch.equal(codes, part.unpacked())


def test_gradient_of_the_weights_is_straight_through() -> None:
    """2 E H where nothing is clipped, 0 where it is; the loop hands E's gradient to autograd."""
    stage = AdaQuant()
    problem, part = started("int2-g16-z", stage, "rtn")
    soft = Soft(problem.weight, part)
    with torch.no_grad():
        soft.V[0, 0] = 1e3
    levels, scale, _ = soft()
    error = levels * problem.each(scale) - problem.weight
    R = error.detach() @ problem.H
    error.backward(2 * R)
    assert soft.V.grad is not None
    assert soft.V.grad[0, 0] == 0
    torch.testing.assert_close(soft.V.grad[1:], 2 * R[1:], rtol=1e-5, atol=1e-5)


def test_at_many_bits_nothing_is_left_to_gain() -> None:
    stage = AdaQuant(steps=20)
    problem, part = started("int8-g8-z", stage, "rtn")
    found = stage.refine(problem, part)
    size = ((problem.weight @ problem.H) * problem.weight).sum()
    assert losses(problem, found).sum() < 1e-4 * size
    assert (found.dense() - part.dense()).abs().max() <= 2 * float(part.scale.max())


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="adaquant: an option is negative"):
        AdaQuant(weights=-1.0)
    with pytest.raises(ValueError, match="adaquant: an option is out of range"):
        AdaQuant(first=1.0)
    assert AdaQuant(drift=0.5).needs() == (Hessian(drift=True),)
