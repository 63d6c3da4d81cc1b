"""Losses of a block's output: formulas in float64, weights by position, no wrong scale."""

import math

import pytest
import torch
from torch import Tensor

from aptq.core.losses import LOSSES, TRIM, cosine, distribution, mse, trimmed


def outputs(windows: int = 3, length: int = 20, width: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (windows, length, width)
    wanted = torch.randn(shape, generator=generator)
    return wanted + 0.1 * torch.randn(shape, generator=generator), wanted


WEIGHT = torch.linspace(0.1, 1.9, 20)


def test_mse_counts_positions() -> None:
    got, wanted = outputs()
    error = (got.double() - wanted.double()).square()
    assert float(mse(got, wanted, None)) == pytest.approx(float(error.mean()))
    weighted = (error * WEIGHT.double()[:, None]).mean()
    assert float(mse(got, wanted, WEIGHT)) == pytest.approx(float(weighted))


def test_cosine_adds_the_angle_of_every_token() -> None:
    got, wanted = outputs()
    a, b = got.double(), wanted.double()
    angle = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    wanted_loss = mse(got, wanted, WEIGHT) - (angle.log() * WEIGHT.double()).mean()
    assert float(cosine(got, wanted, WEIGHT)) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert float(cosine(2 * wanted, wanted, None) - mse(2 * wanted, wanted, None)) < 1e-6
    assert math.isfinite(float(cosine(-wanted, wanted, None)))


def test_distribution_is_of_each_window() -> None:
    got, wanted = outputs()
    total = 0.0
    for ours, theirs in zip(got.double(), wanted.double(), strict=True):
        mean = (ours.mean(0) - theirs.mean(0)).abs()
        variance = (ours.var(0, unbiased=False) - theirs.var(0, unbiased=False)).abs()
        total += float((mean + variance).mean()) / len(got)
    assert float(distribution(got, wanted, None)) == pytest.approx(total)
    shuffled = wanted[:, torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    assert float(distribution(shuffled, wanted, None)) < 1e-6
    assert float(mse(shuffled, wanted, None)) > 0.1


def test_trimmed_leaves_the_largest_thousandth_out() -> None:
    got, wanted = outputs(width=100)
    got[0, 0, :3] += 100.0  # a two-thousandth
    flat = (got - wanted).double().square().flatten().sort().values
    drop = int(TRIM * len(flat))
    assert drop == 6
    got.requires_grad_()
    loss = trimmed(got, wanted, None)
    assert float(loss.detach()) == pytest.approx(float(flat[:-drop].mean()))
    loss.backward()
    assert got.grad is not None
    assert int((got.grad == 0).sum()) == drop
    got.requires_grad_(False)
    small, aim = outputs(1, 2, 4)
    assert float(trimmed(small, aim, None)) == pytest.approx(float(mse(small, aim, None)))
    for weight in (WEIGHT, torch.ones(20)):
        assert float(trimmed(got, wanted, weight)) <= float(mse(got, wanted, weight))


@pytest.mark.parametrize("name", LOSSES)
def test_all_are_zero_at_the_target_and_computed_in_float32(name: str) -> None:
    got, wanted = outputs()
    loss = LOSSES[name]
    assert float(loss(wanted, wanted, None)) == pytest.approx(0.0, abs=1e-6)
    half = loss(got.bfloat16(), wanted.bfloat16(), None)
    assert half.dtype == torch.float32
    exact = loss(got.bfloat16().float(), wanted.bfloat16().float(), None)
    assert float(half) == pytest.approx(float(exact), rel=1e-6)
    x = wanted.clone().requires_grad_()
    loss(x, wanted, None).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
