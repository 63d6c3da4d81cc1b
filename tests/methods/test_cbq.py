"""CBQ: two blocks at a time, low-rank logits; at full rank and one block it is AdaRound."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from aptq.core.grid import Grid
from aptq.core.losses import channels
from aptq.core.parts import Quantized
from aptq.core.plan import PartSpec, Plan, Target
from aptq.core.rounding import fit
from aptq.core.soft import spread
from aptq.engine.block import Block
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.stream import open_stream
from aptq.engine.tune import rate
from aptq.engine.walk import walk
from aptq.methods.reconstruct.cbq import CBQ, LowRank
from aptq.model.model import Model
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model

GRID = Grid.parse("int3-g16-z")
ADAROUND = CBQ(
    blocks=1, rank=0, sharpen=1.0, scales=0.0, penalty=0.5, truncate=False,
    loss="mse", target="same", steps=10, batch=2, checks=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama", torch.float32))


def layer(seed: int = 0) -> Layer:
    W = torch.randn(24, 50, generator=torch.Generator().manual_seed(seed))
    return Layer("block.linear", "up", W, None, Target((PartSpec(GRID),)))


def knob(stage: CBQ, one: Layer) -> LowRank:
    made = stage.knob(one, torch.Generator().manual_seed(0))
    assert isinstance(made, LowRank)
    return made


def walked(model: Model, stages: list, folder: Path, count: int, grid: str) -> list[Block]:  # type: ignore[type-arg]
    blocks: list[Block] = []
    stream = open_stream(model, windows(count, 12), device=CPU, folder=folder, where="memory")
    walk(model, stream, stages, Plan.uniform(model.shapes, Grid.parse(grid)), sink=blocks.append)
    return blocks


@pytest.mark.parametrize(("rank", "trained"), [(0, 24 * 50), (3, 3 * 74), (24, 24 * 50)])
def test_parameters(rank: int, trained: int) -> None:
    made = knob(CBQ(rank=rank), layer())
    assert sum(x.numel() for x in made.factors) == trained
    assert made.factor.shape == (24, 4)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_start_is_the_weight_while_soft_and_the_part_when_hard(rank: int) -> None:
    one = layer()
    made = knob(CBQ(rank=rank, truncate=False), one)
    start = one.parts[0]
    assert isinstance(start, Quantized)
    assert torch.equal(made.part().dense(), start.dense())
    soft, hard = made.weight(), start.dense()
    assert (((soft - one.weight).abs() < 1e-5) | ((soft - hard).abs() < 1e-5)).all()


def test_sharpened_logits_end_hard_and_store_what_they_compute() -> None:
    made = knob(CBQ(rank=3, steps=10, sharpen=1e9), layer())
    with torch.no_grad():
        made.factors[1].normal_(generator=torch.Generator().manual_seed(0))
        made.factor.mul_(1.1)
    part = made.part()
    for _ in range(10):
        made.stepped()
    assert isinstance(part, Quantized)
    assert set((part.unpacked() - made.lower).unique().tolist()) == {0, 1}
    torch.testing.assert_close(made.weight(), part.dense(), rtol=0, atol=1e-6)
    assert torch.equal(made.part().dense(), part.dense())  # only signs decide


def test_every_choice_is_one_of_two(model: Model, tmp_path: Path) -> None:
    (first, _) = walked(model, [CBQ(steps=30, batch=2, scales=0.0)], tmp_path, 12, "int3-g16-z")
    for one in first.layers.values():
        grid, part = one.target.grid, one.parts[0]
        assert grid is not None
        assert isinstance(part, Quantized)
        unit = spread(part.scale.float(), part.shape[1], grid)
        inside = (part.unpacked() > 0) & (part.unpacked() < grid.levels - 1)
        assert ((part.dense() - one.weight).abs() / unit)[inside].max() < 1.001


def test_outliers_are_cut_off_before_ranges_are_taken_unless_there_are_parts() -> None:
    one = layer()
    one.weight[3, 7] = 60.0
    plain = CBQ(truncate=False).on_layer(layer()).error()
    cut = CBQ().on_layer(one)
    assert cut.counts["truncated"] == 1
    assert cut.dense().abs().max() < 10
    expected = layer()
    expected.weight[3, 7] = 0.0
    start = methods.get("rtn")().on_layer(expected)
    other = torch.arange(24) != 3
    assert torch.equal(cut.dense()[other], start.dense()[other])
    assert plain == methods.get("rtn")().on_layer(layer()).error()
    made = methods.get("rtn")().on_layer(layer())
    part = made.parts[0]
    assert CBQ().on_layer(made).parts == [part]
    assert "truncated" not in made.counts


def test_penalty_comes_after_a_fifth_and_is_a_share() -> None:
    made = knob(CBQ(penalty=0.5, steps=10), layer())
    found = []
    for _ in range(10):
        found.append(made.penalty())
        made.stepped()
    assert found[:2] == [None, None]
    assert all(x is not None and 0 < x <= 0.5 for x in found[2:])
    assert knob(CBQ(penalty=0.0), layer()).penalty() is None


class Plain:
    """AdaRound of one block, written down again: W_q = s (floor(W / s) + h(v)), clipped."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module, self.names = module, names
        weights = {name: module.get_parameter(name).detach() for name in names}
        self.wide, self.floor, self.v = {}, {}, {}
        for name, W in weights.items():
            scale, zero = fit(W, GRID)
            assert zero is not None
            s, z = (spread(x.float(), W.shape[1], GRID) for x in (scale, zero))
            u = (W / s).clamp(-z, 7 - z)
            floor = torch.minimum(u.floor(), 6 - z)
            p = (u - floor + 0.1) / 1.2
            self.wide[name], self.floor[name] = (s, z), floor
            self.v[name] = nn.Parameter(torch.log(p / (1 - p)))

    def step(self, x: Tensor, call, aim: Tensor, beta: float | None) -> Tensor:  # type: ignore[no-untyped-def]
        h = {n: (v.sigmoid() * 1.2 - 0.1).clamp(0, 1) for n, v in self.v.items()}
        made = {n: self.wide[n][0] * (self.floor[n] + h[n]) for n in self.names}
        got = call.at(x).run(lambda *a, **k: functional_call(self.module, made, a, k))
        loss = (got - aim).square().mean()
        if beta is None:
            return loss
        rest = torch.stack([(1 - (2 * x - 1).abs() ** beta).mean() for x in h.values()]).sum()
        return loss + 0.5 * loss.detach() * rest


def test_full_rank_and_one_block_is_adaround(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits after every step, for ten steps of the first block."""
    seen: list[Tensor] = []

    def note(self: LowRank) -> None:
        self.done += 1
        seen.append(self.factors[0].detach().clone())

    monkeypatch.setattr(LowRank, "stepped", note)
    blocks = walked(model, [ADAROUND], tmp_path, 4, str(GRID))
    names = [name.split("layers.0.")[1] + ".weight" for name in blocks[0].layers]
    ours = [seen[at : at + len(names)] for at in range(0, 10 * len(names), len(names))]

    stream = open_stream(model, windows(4, 12), device=CPU, folder=tmp_path, where="memory")
    stream.learn(model, {2})
    x, call, module = stream.hidden[1:3], stream.calls[0][2], model.load(0)  # 0 and 3 are held out
    with torch.no_grad():
        aim = call.at(x).run(module)
    plain = Plain(module, names)
    optimizer = torch.optim.Adam(plain.v.values(), eps=1e-15)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = ADAROUND.rounding * rate(step, 10, "cosine")
        optimizer.zero_grad()
        beta = None if step < 2 else 20 - 18 * (step - 2) / 8
        plain.step(x, call, aim, beta).backward()
        optimizer.step()
        for got, name in zip(ours[step], names, strict=True):
            off = (got - plain.v[name].detach()).abs()
            assert (off < 1e-3).float().mean() > 0.999, (step, name)
    model.unload(0)


def test_a_second_window_starts_where_the_first_ended(model: Model, tmp_path: Path) -> None:
    stage = CBQ(steps=60, batch=4)
    found = walked(model, [stage, stage], tmp_path, 48, "int2-g16-z")
    one, two = [record for block in found for record in block.records]
    assert one["end"] < one["start"]
    assert two["start"] == one["end"]
    assert two["end"] <= two["start"]


@pytest.mark.parametrize("first", ["", "gptq"])
def test_better_than_its_start(first: str, model: Model, tmp_path: Path) -> None:
    stage = CBQ(steps=200, batch=4)
    stages = [*([methods.get(first)()] if first else []), stage]
    found = [x for b in walked(model, stages, tmp_path, 48, "int2-g16-z") for x in b.records]
    (record,) = [x for x in found if x["stage"] == "cbq"]  # one window holds both blocks
    assert record["kept"]
    assert record["end"] < 0.95 * record["start"]


def test_channels_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    got, wanted = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    weight = torch.tensor([0.5, 1.0, 1.5])
    p, q = wanted.double().softmax(-1), got.double().softmax(-1)
    token = (p * (p / q).log()).sum(-1) + (got - wanted).double().square().mean(-1)
    expected = (token * weight).mean().float()
    torch.testing.assert_close(channels(got, wanted, weight), expected)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="rank = -1"):
        CBQ(rank=-1)
    with pytest.raises(ValueError, match=r"sharpen = 0\.5"):
        CBQ(sharpen=0.5)
