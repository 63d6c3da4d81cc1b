"""TesseraQ: decisions come a share at a time and stay, and the block gets better by them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import PartSpec, Plan, Target
from aptq.core.rounding import snap
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.engine.walk import walk
from aptq.methods.reconstruct.tesseraq import SOFT, Progressive, TesseraQ, hardened, soft_share
from aptq.model.model import Model
from tests.engine.run import CPU, walked, windows
from tests.tiny import tiny_model

from aptq.engine.stream import open_stream  # isort: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama", torch.float32))


def layer(grid: str, seed: int = 0) -> Layer:
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(seed))
    return Layer("block.linear", "up", W, None, Target((PartSpec(Grid.parse(grid)),)))


def opened(grid: str, **options: float) -> tuple[Layer, Progressive]:
    one = layer(grid)
    knob = TesseraQ(**options).knob(one, torch.Generator())  # type: ignore[arg-type]
    assert isinstance(knob, Progressive)
    return one, knob


def records(model: Model, stages: Sequence[Stage], folder: Path, grid: str) -> list[dict]:  # type: ignore[type-arg]
    found: list[dict] = []  # type: ignore[type-arg]
    stream = open_stream(model, windows(48, 20), device=CPU, folder=folder, where="memory")
    plan = Plan.uniform(model.shapes, Grid.parse(grid))
    walk(model, stream, stages, plan, sink=lambda block: found.extend(block.records))
    return found


@pytest.mark.parametrize("grid", ["int2-g16-z", "int3-row", "int4-g16-fz"])
def test_soft_weight_is_the_clipped_weight(grid: str) -> None:
    one, knob = opened(grid)
    soft, hard = knob.weight(), knob.part().dense()
    same = (soft - one.weight).abs() < 1e-5
    cut = (soft - hard).abs() < 1e-5  # beyond the grid's ends, which are hard
    assert (same | cut).all()
    assert (soft[~same].abs() < one.weight[~same].abs()).all()
    assert same.float().mean() > 0.7


def test_without_clipping_it_is_the_weight() -> None:
    one, knob = opened("int8-g16-fz", clip=1.0)
    torch.testing.assert_close(knob.weight(), one.weight, rtol=0, atol=1e-2)


def test_the_start_rounds_to_nearest_on_clipped_ranges() -> None:
    one, knob = opened("int2-g16-z")
    part, start = knob.part(), one.parts[0]
    assert isinstance(part, Quantized)
    assert isinstance(start, Quantized)
    assert torch.equal(part.dense(), snap(one.weight, start.scales(), start.grid))
    assert torch.equal(part.codes, start.codes)
    rtn = methods.get("rtn")().on_layer(layer("int2-g16-z"))
    assert one.error() < rtn.error()


def test_shares_of_the_turns() -> None:
    assert [soft_share(turn, 20) for turn in range(20)] == list(SOFT)
    for turns in (1, 2, 7, 10, 50):
        shares = [soft_share(turn, turns) for turn in range(turns)]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == pytest.approx(0.005)
        assert max(shares) <= 0.8


def test_soft_share_after_each_turn_and_hard_ones_stay() -> None:
    """With clipping, so that some logits start at an end; and with Adam between the turns."""
    _, knob = opened("int4-g16-z")
    count = knob.rounding.numel()
    generator = torch.Generator().manual_seed(0)
    before = torch.zeros_like(knob.rounding)
    for turn in range(20):
        knob.begin(turn, 20)
        soft = int(knob.rounding.isfinite().sum())
        assert abs(soft - SOFT[turn] * count) < 1
        hard = before.isinf()
        assert torch.equal(knob.rounding[hard], before[hard])
        optimizer = torch.optim.Adam(knob.groups(), weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            aim = torch.randn(knob.lower.shape, generator=generator)
            (knob.weight() - aim).square().mean().backward()
            assert knob.rounding.grad is not None
            assert not knob.rounding.grad[knob.rounding.isinf()].any()
            optimizer.step()
        before = knob.rounding.detach().clone()
        assert not before.isnan().any()


def test_the_most_decided_become_hard() -> None:
    logits = torch.tensor([-2.0, -0.1, 0.2, 1.0, 3.0])
    found = hardened(logits, 0.4)
    expected = [-torch.inf, pytest.approx(-0.1), pytest.approx(0.2), torch.inf, torch.inf]
    assert found.tolist() == expected
    assert torch.equal(hardened(found, 1.0), found)


def test_stored_is_what_a_hard_block_computes() -> None:
    _, knob = opened("int2-g16-z")
    with torch.no_grad():
        knob.factor.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
        knob.rounding.copy_(hardened(knob.rounding, 0.0))
    part = knob.part()
    assert torch.equal(part.dense(), knob.weight().detach())
    assert (knob.gain() != 1).any()


def test_rates_of_zero_change_nothing(model: Model, tmp_path: Path) -> None:
    plan = Plan.uniform(model.shapes, Grid.parse("int2-g16-z"))
    still = TesseraQ(steps=40, rounding=0.0, scales=0.0, batch=2)
    ours = walked(model, [still], plan, tmp_path).layers
    start = walked(model, [TesseraQ(steps=0)], plan, tmp_path).layers
    for name, one in ours.items():
        assert torch.equal(one.dense(), start[name].dense()), name


@pytest.mark.parametrize("first", ["", "gptq"])
def test_better_than_its_start(first: str, model: Model, tmp_path: Path) -> None:
    stage = TesseraQ(steps=160, batch=4, rounding=2e-2)
    stages = [*([methods.get(first)()] if first else []), stage]
    found = records(model, stages, tmp_path, "int2-g16-z")
    assert sum(one["end"] for one in found) < 0.95 * sum(one["start"] for one in found)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="turns = 0"):
        TesseraQ(turns=0)
    with pytest.raises(ValueError, match=r"clip = 1\.5"):
        TesseraQ(clip=1.5)
