"""AutoRound: where it starts, how far it may go, and that only signs of gradients count."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import PartSpec, Plan, Target
from aptq.core.rounding import fit, snap
from aptq.core.soft import opened, spread
from aptq.engine.block import Block
from aptq.engine.knobs import Knobs
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Together
from aptq.engine.stage import methods
from aptq.engine.stream import open_stream
from aptq.engine.tune import tune
from aptq.engine.walk import walk
from aptq.methods.quantize.gptq import GPTQ
from aptq.methods.reconstruct.autoround import AutoRound, Offsets
from aptq.model.model import Model
from tests.engine.run import CPU, windows
from tests.methods.test_gptq import layer as calibrated
from tests.tiny import tiny_model

GRIDS = ["int2-g16-z", "int3-g7", "int4-row-fz", "int2-row", "int5-g16-bf16", "int8-g64-fz-bf16"]
NONE = torch.Generator()


def bare(name: str, seed: int = 0) -> Layer:
    W = torch.randn(12, 40, generator=torch.Generator().manual_seed(seed))
    return Layer("block.linear", "up", W, None, Target((PartSpec(Grid.parse(name)),)))


def knob(layer: Layer, stage: AutoRound | None = None) -> Offsets:
    made = (stage or AutoRound()).knob(layer, NONE)
    assert isinstance(made, Offsets)
    return made


def fitted(made: Offsets, steps: int, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Tune the layer's output on random inputs; V after every step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    seen = []

    class One:
        groups, begin = staticmethod(made.groups), staticmethod(made.begin)

        def stepped(self) -> None:
            made.stepped()
            seen.append(made.V.detach().clone())

        def state(self) -> dict[str, Tensor]:
            return made.state_dict()

        def restore(self, state: dict[str, Tensor]) -> None:
            made.load_state_dict(state)

    def loss() -> Tensor:
        return (x @ (made.weight() - made.W).T).square().mean()

    def gradients(_step: int) -> Tensor:
        value = scale * loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    tune(One(), gradients, lambda: float(loss().detach()), AutoRound(steps=steps).pace())
    return seen


@pytest.mark.parametrize("name", GRIDS)
def test_starts_at_nearest_rounding(name: str) -> None:
    """Without parts: the codes, scales and zeros of min-max rounding, V = 0."""
    one, two = bare(name), bare(name)
    made, wanted = knob(one).part(), methods.get("rtn")().on_layer(two).parts[0]
    assert not one.parts
    assert knob(one).V.abs().max() == 0
    for key, value in wanted.tensors().items():
        assert torch.equal(made.tensors()[key], value), key


@pytest.mark.parametrize("name", GRIDS)
def test_starts_at_the_part_of_an_earlier_stage(name: str) -> None:
    """Codes of GPTQ, far from the nearest ones; ranges are those that its scales imply."""
    layer = calibrated(name)
    part = GPTQ(clip=0.5).on_layer(layer).parts[0]
    assert isinstance(part, Quantized)
    made = knob(layer)
    again = made.part()
    for key, value in part.tensors().items():
        assert torch.equal(again.tensors()[key], value), key
    assert torch.equal(made.low, torch.ones_like(made.low))
    torch.testing.assert_close(made.weight().detach(), part.dense())
    latent, scales = opened(part, layer.weight)
    exact = layer.weight / spread(scales.scale, 40, part.grid)
    torch.testing.assert_close(made.V.detach(), latent - exact, atol=1e-5, rtol=0)


def test_zeroless_scales_keep_the_sign_of_their_part() -> None:
    """However far either factor goes, the codes do not turn around."""
    layer = methods.get("rtn")().on_layer(bare("int3-g16"))
    made = knob(layer)
    before = made.now()[1].scale
    assert (before < 0).any()
    assert (before > 0).any()
    with torch.no_grad():
        made.low.fill_(0.5)
        made.high.fill_(0.6)
    share = made.now()[1].scale / before
    torch.testing.assert_close(share, torch.where(before > 0, 0.5, 0.6), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", GRIDS)
def test_far_end_of_a_zeroless_range_has_the_lowest_level(name: str) -> None:
    """The formula of the scales is that of `fit`, at factors of any size."""
    layer, grid = bare(name), Grid.parse(name)
    made = knob(layer)
    with torch.no_grad():
        made.low.fill_(0.5)
        made.high.fill_(0.5)
    wanted = fit(0.5 * layer.weight, grid)
    found = made.now()[1]
    torch.testing.assert_close(found.scale, wanted.scale.float())
    if found.zero is not None and wanted.zero is not None:
        torch.testing.assert_close(found.zero, wanted.zero.float())


@pytest.mark.parametrize("name", GRIDS)
def test_offsets_stay_within_half_a_step(name: str) -> None:
    """|V| <= (T + 1) / 2T and factors in [0, 1]; packed = trained, whatever was reached."""
    steps = 20
    made = knob(bare(name), AutoRound(steps=steps))
    seen = fitted(made, steps)
    bound = (steps + 1) / (2 * steps)
    assert 0.3 < max(float(V.abs().max()) for V in seen) <= bound + 1e-6
    for factor in (made.low, made.high):
        assert float(factor.detach().min()) >= 1 - bound - 1e-6
        assert float(factor.detach().max()) <= 1
    assert torch.equal(made.part().dense(), made.weight().detach())


@pytest.mark.parametrize("name", ["int2-g16-z", "int3-g7"])
def test_without_ranges_codes_move_by_one(name: str) -> None:
    layer = bare(name)
    made = knob(layer, AutoRound(ranges=0.0, steps=20))
    start = made.part()
    fitted(made, 20)
    part = made.part()
    assert isinstance(part, Quantized)
    assert isinstance(start, Quantized)
    assert torch.equal(part.scale, start.scale)
    moved = part.unpacked().int() - start.unpacked().int()
    assert set(moved.unique().tolist()) == {-1, 0, 1}


def test_only_the_sign_counts() -> None:
    """A loss of another size leads along bit-identical offsets."""
    one, two = (
        fitted(knob(bare("int2-g16-z"), AutoRound(steps=15)), 15, scale) for scale in (1.0, 2.0**12)
    )
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[-1], one[0])


def test_gradients_of_offsets_factors_and_zero() -> None:
    """One group by hand: s = (b hi - a lo) / 3, z = round(-a lo / s) with d z = d(-a lo / s)."""
    layer = bare("int2-row-z")
    layer.weight = torch.tensor([[-0.6, -0.1, 0.22, 0.31, 0.9]])
    made = knob(layer)
    made.double()
    made.W, made.lowest, made.highest = made.W.double(), made.lowest.double(), made.highest.double()
    with torch.no_grad():
        made.low.fill_(0.5)  # the first weight lies outside
    s, z, low, high = 0.4, 1.0, 0.6, 0.9
    inside, levels = [False, True, True, True, True], [-1.0, 0.0, 1.0, 1.0, 2.0]
    for column in range(5):
        grads = torch.autograd.grad(made.weight()[0, column], (made.V, made.low, made.high))
        w, free = float(layer.weight[0, column]), inside[column]
        per_scale = levels[column] - (w / s if free else 0.0)
        per_zero = 0.0 if free else -s
        a = per_scale * low / 3 + per_zero * (low / s - 0.5 * low / s**2 * low / 3)
        b = per_scale * high / 3 - per_zero * 0.5 * low / s**2 * high / 3
        assert float(grads[0][0, column]) == pytest.approx(s if free else 0.0, rel=1e-3)
        assert float(grads[1]) == pytest.approx(a, abs=1e-3)
        assert float(grads[2]) == pytest.approx(b, abs=1e-3)
    zero = made.now()[1].zero
    assert zero is not None
    assert zero.tolist() == [[z]]


def test_ranges_may_grow_where_asked() -> None:
    for widest, most in ((1.0, 1.0), (2.0, 1.5)):
        made = knob(bare("int4-g16-z"), AutoRound(widest=widest))
        with torch.no_grad():
            made.low.fill_(1.5)
            made.high.fill_(-0.5)
        made.stepped()
        assert made.low.unique().tolist() == [most]
        assert made.high.unique().tolist() == [0.0]


def test_rates() -> None:
    grids = [Grid.parse(name) for name in ("int4-g16", "int3-g16")]
    assert [AutoRound(steps=50).rates(g) for g in grids] == [(0.02, 0.02)] * 2
    stage = AutoRound(rate=0.004, ranges=0.5, double=True)
    assert [stage.rates(g) for g in grids] == [(0.004, 0.002), (0.008, 0.004)]
    with pytest.raises(ValueError, match="widest"):
        AutoRound(widest=0.5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), torch.float32)


def walked(source: Path, folder: Path, stage: AutoRound, grid: str) -> list[Block]:
    model, done = Model.open(source), list[Block]()
    stream = open_stream(model, windows(16, 24), device=CPU, folder=folder, where="memory")
    plan = Plan.uniform(model.shapes, Grid.parse(grid))
    sink: Callable[[Block], None] = done.append
    walk(model, stream, [stage], plan, sink=sink)
    return done


@pytest.mark.parametrize(("grid", "share"), [("int2-g16-z", 0.8), ("int2-g16", 0.9)])
def test_block_loss_falls_clearly_at_two_bits(
    grid: str, share: float, llama: Path, tmp_path: Path
) -> None:
    for block in walked(llama, tmp_path, AutoRound(steps=60), grid):
        (found,) = block.records
        assert found["kept"]
        assert found["end"] < share * found["start"]
        assert found["last"] < found["first"]


def test_without_steps_it_is_rounding_to_nearest(llama: Path, tmp_path: Path) -> None:
    for block in walked(llama, tmp_path, AutoRound(steps=0), "int3-g16-z"):
        for layer in block.layers.values():
            grid = Grid.parse("int3-g16-z")
            assert torch.equal(layer.dense(), snap(layer.weight, fit(layer.weight, grid), grid))


def test_experts_that_no_token_reaches_stay(tmp_path: Path) -> None:
    """sign(0) = 0, and what has no gradient does not move."""
    model = Model.open(tiny_model("mixtral", tmp_path / "moe", torch.float32))
    stream = open_stream(model, windows(2, 2), device=CPU, folder=tmp_path, where="memory")
    groups, plan = model.groups(0), Plan.uniform(model.shapes, Grid.parse("int2-g16-z"))
    block = Block(0, model.block_name(0), model.load(0), groups, plan, stream, "block")
    stage = AutoRound(steps=1)
    knobs: Knobs = stage.open(block, NONE)
    start = [one.V.detach().clone() for one in knobs.knobs]  # type: ignore[operator,union-attr]

    def gradients(_step: int) -> Tensor:
        call = stream.calls[0][2]
        values = knobs.tensors()
        got = call.at(stream.hidden).run(
            lambda *a, **k: torch.func.functional_call(block.module, values, a, k)
        )
        loss = got[:1, :1].square().mean()
        loss.backward()
        return loss

    held = iter(range(100, 0, -1))
    tune(Together([knobs]), gradients, lambda: float(next(held)), stage.pace())
    still = [
        name
        for name, one, before in zip(knobs.names, knobs.knobs, start, strict=True)
        if torch.equal(one.V, before)
    ]
    owners = {name.partition("experts.")[2][:1] for name in still if "experts" in name}
    assert len(owners) == 2  # of four, two of which see the token that counts
    assert sum("experts" in name for name in still) == 6
