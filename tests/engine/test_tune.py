"""The gradient loop: what it keeps, when it goes back, and that its steps are the optimizers'."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from aptq.core.grid import Grid
from aptq.core.soft import level, spread
from aptq.engine.tune import FLOOR, Pace, SignSGD, Tuned, batches, make_optimizer, rate, tune
from tests.blocks import opened


class Point:
    """A vector to bring to `aim`; the training gradient may lead elsewhere."""

    def __init__(self, start: list[float], lr: float = 0.1) -> None:
        self.x = nn.Parameter(torch.tensor(start))
        self.aim = torch.zeros(len(start))
        self.lr, self.turns, self.steps = lr, list[tuple[int, int]](), 0
        self.made = 0  # optimizers

    def groups(self) -> list[dict[str, Any]]:
        self.made += 1
        return [{"params": [self.x], "lr": self.lr}]

    def begin(self, turn: int, turns: int) -> None:
        self.turns.append((turn, turns))

    def stepped(self) -> None:
        self.steps += 1

    def state(self) -> Mapping[str, Tensor]:
        return {"x": self.x}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.x.copy_(state["x"])

    def gradients(self, _step: int) -> Tensor:
        loss = (self.x - self.aim).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def held(self) -> float:
        return float(self.x.detach().square().sum())

    def tune(self, pace: Pace, gradients: Callable[[int], Tensor] | None = None) -> Tuned:
        return tune(self, gradients or self.gradients, self.held, pace)


def test_schedules() -> None:
    assert [rate(i, 4, "linear") for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert sum(rate(i, 200, "linear") for i in range(200)) == pytest.approx(201 / 2)
    assert rate(0, 100, "cosine") == 1.0
    assert rate(50, 100, "cosine") == pytest.approx(FLOOR + (1 - FLOOR) / 2)
    assert rate(10**6 - 1, 10**6, "cosine") == pytest.approx(FLOOR)
    assert {rate(i, 5, "constant") for i in range(5)} == {1.0}
    warm = [rate(i, 10, "constant", warm=0.4) for i in range(10)]
    assert warm[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert warm[4:] == [1.0] * 6


def test_sign_steps_have_the_size_of_the_rate() -> None:
    x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    still = nn.Parameter(torch.ones(2))
    optimizer = SignSGD([{"params": [x, still], "lr": 0.25}])
    x.grad = torch.tensor([1e-20, -1e20, 0.0])
    optimizer.step()
    assert x.tolist() == [0.75, -1.75, 3.0]
    assert still.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["adam", "adamw", "sign"])
def test_rates_of_groups_follow_the_schedule(name: str) -> None:
    """Nothing decays, and every group keeps its share."""
    slow, fast = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [slow], "lr": 0.01}, {"params": [fast], "lr": 0.1}]
    optimizer = make_optimizer(name, groups)  # type: ignore[arg-type]
    slow.grad, fast.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    moved = [1 - float(x.detach()) for x in (slow, fast)]
    assert moved == pytest.approx([0.01, 0.1], rel=1e-4)


def test_turns_get_fresh_optimizers_and_share_the_steps() -> None:
    point = Point([1.0])
    point.tune(Pace(10, "adam", turns=3))
    assert point.turns == [(0, 3), (1, 3), (2, 3)]
    assert point.steps == 10
    assert point.made == 3
    many = Point([1.0])
    many.tune(Pace(2, "adam", turns=5))
    assert many.turns == [(0, 2), (1, 2)]


def test_best_check_is_kept() -> None:
    """The gradient overshoots: the loop comes back to the check that was nearest."""
    point = Point([1.0])
    point.aim = torch.tensor([-1.0])
    found = point.tune(Pace(20, "sign", "constant", checks=20))
    assert float(point.x.detach()) == pytest.approx(0.0, abs=1e-6)
    assert found.kept
    assert (found.start, found.end) == (1.0, pytest.approx(0.0, abs=1e-6))
    last = Point([1.0])
    last.aim = torch.tensor([-1.0])
    kept = last.tune(Pace(15, "sign", "constant", checks=5, best=False))
    assert float(last.x.detach()) == pytest.approx(-0.5, abs=1e-6)
    assert kept.end == pytest.approx(0.25)


@pytest.mark.parametrize("best", [True, False])
def test_a_block_is_never_left_worse(best: bool) -> None:
    point = Point([0.5, -0.25])
    point.aim = torch.tensor([9.0, 9.0])
    found = point.tune(Pace(30, "adam", best=best))
    assert point.x.tolist() == [0.5, -0.25]
    assert not found.kept
    assert found.start == found.end
    assert found.last < found.first


def test_no_steps_change_nothing() -> None:
    point = Point([0.5])
    found = point.tune(Pace(0, "adamw"))
    assert point.x.tolist() == [0.5]
    assert not found.kept
    assert math.isnan(found.first)


def test_a_loss_that_is_not_finite_sends_back_and_halves_the_rate() -> None:
    """What is kept is finite, and the steps after it are half as long."""
    point, sizes = Point([1.0], lr=0.01), list[float]()

    def gradients(step: int) -> Tensor:
        sizes.append(float(point.x.detach()))
        loss = point.gradients(step)
        return loss * math.nan if step == 7 else loss

    found = point.tune(Pace(20, "sign", "constant", checks=4), gradients)
    assert found.restarts == 1
    assert point.made == 2
    assert found.kept
    assert math.isfinite(found.end)
    assert sizes[0] - sizes[1] == pytest.approx(0.01, rel=1e-3)
    assert sizes[10] == pytest.approx(sizes[5])  # back to the check after five steps
    assert sizes[10] - sizes[11] == pytest.approx(0.005, rel=1e-3)
    assert found.end == pytest.approx((1 - 0.05 - 0.05) ** 2, rel=1e-3)


def test_parameters_that_are_not_finite_are_taken_back() -> None:
    point = Point([1.0])

    def gradients(step: int) -> Tensor:
        loss = point.gradients(step)
        if step == 2 and point.x.grad is not None:
            point.x.grad.fill_(math.nan)
        return loss

    found = point.tune(Pace(40, "adam", "constant", checks=10), gradients)
    assert found.restarts == 1
    assert float(point.x.detach()) < 0.5


@pytest.mark.parametrize(("norm", "left"), [(0.0, 10.0), (0.5, 0.5), (50.0, 10.0)])
def test_long_gradients_are_cut(norm: float, left: float) -> None:
    point, seen = Point([3.0, 4.0]), list[float]()

    def stepped() -> None:
        assert point.x.grad is not None
        seen.append(float(point.x.grad.norm()))

    point.stepped = stepped  # type: ignore[method-assign]
    point.tune(Pace(1, "adam", norm=norm))
    assert seen == [pytest.approx(left)]


def test_batches_are_shuffled_epochs() -> None:
    def first(seed: int, count: int) -> Iterator[Tensor]:
        return islice(batches(10, 3, torch.Generator().manual_seed(seed)), count)

    drawn = list(first(0, 9))
    for epoch in range(3):
        seen = torch.cat(drawn[3 * epoch : 3 * epoch + 3])
        assert len(set(seen.tolist())) == 9
        assert seen.tolist() != sorted(seen.tolist())
    assert not torch.equal(torch.cat(drawn[:3]), torch.cat(drawn[3:6]))
    assert all(map(torch.equal, drawn, first(0, 9)))
    assert not torch.equal(drawn[0], next(first(1, 1)))


def test_gradients_of_a_block_against_finite_differences() -> None:
    """float64, of a norm and of the scales of one linear, whose rounding stays as it is."""
    block, grid = opened("gpt2", windows=1, length=5), Grid.parse("int3-g16-z")
    W, path = block.linear("q").weight, block.paths["q"].removeprefix(f"{block.name}.")
    first = (W.float().amax(1, keepdim=True) / 3).expand(-1, 3).double()
    zero = torch.full_like(W, 3.0)
    generator = torch.Generator().manual_seed(3)
    aim = torch.randn(block.call.hidden.shape, generator=generator, dtype=torch.float64)

    def loss(scale: Tensor, norm: Tensor) -> Tensor:
        values = level(W / spread(first, 48, grid), zero, grid) * spread(scale, 48, grid)
        new = {f"{path}.weight": values, "ln_1.weight": norm}
        got = block.call.run(lambda *a, **k: functional_call(block.module, new, a, k))
        return (got - aim).square().mean()

    norm = block.module.get_parameter("ln_1.weight").detach()
    leaves = [x.clone().requires_grad_() for x in (first, norm)]
    found = torch.autograd.grad(loss(*leaves), leaves)
    for number, index in ((0, (0, 0)), (0, (30, 2)), (1, (5,)), (1, (47,))):
        ends = []
        for sign in (1, -1):
            moved = [first.clone(), norm.clone()]
            moved[number][index] += sign * 1e-5
            ends.append(float(loss(*moved)))
        numeric = (ends[0] - ends[1]) / 2e-5
        assert float(found[number][index]) == pytest.approx(numeric, rel=1e-5, abs=1e-9)
