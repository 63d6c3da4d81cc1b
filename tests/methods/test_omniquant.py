"""OmniQuant: learned ranges are nearest rounding where they do not move; folds change nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aptq.core.clipping import OPEN, clipped, logits
from aptq.core.grid import Grid
from aptq.core.parts import Quantized, part_of
from aptq.core.plan import Plan
from aptq.core.rounding import Scales, decode, encode, fit, snap
from aptq.core.soft import extremes, spread
from aptq.engine.block import Block
from aptq.engine.clip import Clip
from aptq.engine.origin import Origin
from aptq.engine.stage import Stage, methods
from aptq.engine.stream import open_stream
from aptq.methods.quantize.rtn import RTN
from aptq.methods.reconstruct.omniquant import OmniQuant
from aptq.model.model import Model
from tests.engine.run import CPU, walked, windows
from tests.tiny import tiny_model

# the last group of 16 out of 40 columns has 8; scales without a zero may be negative
GRIDS = ["int2-g16-z", "int3-g16", "int3-g7-fz", "int4-row-z-bf16"]
FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "cohere2", "gpt_neox")
QUICK: dict[str, Any] = {"steps": 60, "batch": 4, "held": 0.25, "clips": 5e-2}


def weight(seed: int = 0) -> Tensor:
    """[24, 40] with a group of zeros and one of a single sign."""
    made = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
    made[0, :16] = 0
    made[1, :16] = made[1, :16].abs()
    return made


def nearest(W: Tensor, grid: Grid, shrink: float = 1.0) -> Quantized:
    scales = fit(W, grid, shrink=(shrink,))
    made = part_of(snap(W, scales, grid), scales, grid)
    assert isinstance(made, Quantized)
    return made


def clip(text: str, shrink: float = 1.0) -> Clip:
    W = weight()
    return Clip(W, nearest(W, Grid.parse(text), shrink), 1e-2)


@pytest.mark.parametrize("text", GRIDS)
def test_open_ranges_are_those_of_nearest_rounding(text: str) -> None:
    made, grid = clip(text), Grid.parse(text)
    made.stepped()
    with torch.no_grad():
        made.lower.fill_(torch.inf)
        made.upper.fill_(torch.inf)
        assert torch.equal(made.weight(), nearest(weight(), grid).dense())
    assert torch.equal(made.part().dense(), nearest(weight(), grid).dense())


@pytest.mark.parametrize("text", GRIDS)
def test_logits_of_four_shrink_the_range(text: str) -> None:
    made, grid = clip(text), Grid.parse(text)
    assert (made.lower == OPEN).all()
    assert (made.upper == OPEN).all()
    low, high = extremes(weight(), grid)
    open_ = torch.full_like(low, OPEN)
    share = float(torch.sigmoid(torch.tensor(OPEN)))
    assert share == pytest.approx(0.98201, abs=1e-5)
    scales, wanted = clipped(low, high, open_, open_, grid), fit(weight(), grid, shrink=(share,))
    used = wanted.scale[1:].float()
    torch.testing.assert_close(scales.scale[1:], used, rtol=1e-2, atol=0)
    assert (scales.scale[1:] != fit(weight(), grid).scale[1:]).any()
    if scales.zero is not None:
        assert scales.zero.min() >= 0
        assert scales.zero.max() <= grid.levels - 1


@pytest.mark.parametrize("text", GRIDS)
def test_untouched_it_is_the_part_that_came_and_starts_in_its_ranges(text: str) -> None:
    made = clip(text, shrink=0.8)
    assert made.part() is made.before
    low, high = extremes(weight(), made.grid)
    lower, upper = logits(made.before, low, high)
    scales, came = clipped(low, high, lower, upper, made.grid), made.before.scales()
    used = (low < high)[1:]
    ratio = scales.scale[1:].abs() / came.scale[1:].float().abs()
    assert (ratio[used] - 1).abs().max() < 0.02
    made.stepped()
    assert made.part() is not made.before
    made.state_dict()["untouched"].fill_(True)
    assert made.part() is made.before


@pytest.mark.parametrize("text", GRIDS)
def test_gradients_are_those_of_the_soft_forward(text: str) -> None:
    """Against central differences in float64 that hold what was rounded off and what is clipped."""
    made = clip(text, shrink=0.8)
    columns, grid, W = made.exact.shape[1], made.grid, made.exact.double()
    aim = torch.randn(W.shape, generator=torch.Generator().manual_seed(1)).double()
    (made.weight() * aim).sum().backward()
    least = -(grid.levels // 2) if grid.zero == "none" else 0
    ends = least, least + grid.levels - 1
    scale, zero = made.scales()
    fixed = torch.zeros_like(scale) if zero is None else zero.detach()
    latent = W / spread(scale.detach().double(), columns, grid)
    offset = spread(fixed.double(), columns, grid)
    code = (latent + offset).round() if grid.zero == "float" else latent.round() + offset
    inside, held = (code >= ends[0]) & (code <= ends[1]), code - offset - latent

    def value(lower: Tensor, upper: Tensor) -> Tensor:
        """Sum of a row, [out]."""
        low, high = made.low.double() * lower.sigmoid(), made.high.double() * upper.sigmoid()
        if grid.zero == "none":
            h = -torch.where(high > -low, high, low) / (grid.levels // 2)
        else:
            h = (high - low) / (grid.levels - 1)
        moving = -low / h if grid.zero == "float" else fixed.double()
        wide = spread(h, columns, grid)
        bound = code.clamp(*ends) - spread(moving, columns, grid)
        return (torch.where(inside, W / wide + held, bound) * wide * aim).sum(1)

    lower, upper = made.lower.detach().double(), made.upper.detach().double()
    step = torch.zeros_like(lower)
    step[:, 0] = 1e-5
    none = torch.zeros_like(step)
    for parameter, down, up in ((made.lower, step, none), (made.upper, none, step)):
        slope = (value(lower + down, upper + up) - value(lower - down, upper - up)) / 2e-5
        assert parameter.grad is not None
        assert slope[1:].abs().max() > 0.1
        torch.testing.assert_close(parameter.grad[1:, 0].double(), slope[1:], rtol=2e-2, atol=2e-2)


def test_whole_zeros_have_no_gradient() -> None:
    W = torch.tensor([[-1.0, 1.0, 0.3, -0.2]])
    made = Clip(W, nearest(W, Grid.parse("int2-row-z"), 0.5), 1e-2)
    zero = made.scales().zero
    assert zero is not None
    assert not zero.requires_grad


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tiny")
    return {name: tiny_model(name, base) for name in FAMILIES}


def first(source: Path, folder: Path, grid: str, count: int = 16) -> Block:
    """Block 0 with its stream and its original."""
    model = Model.open(source)
    stream = open_stream(model, windows(count), device=CPU, folder=folder, where="memory")
    stream.learn(model, {1, 2, 4, 8})
    plan = Plan.uniform(model.shapes, Grid.parse(grid))
    module, name, groups = model.load(0), model.block_name(0), model.groups(0)
    origin = Origin(0, name, module, stream.twin())
    return Block(0, name, module, groups, plan, stream, "block", None, origin)


def run(block: Block, *stages: Stage) -> dict[str, Any]:
    """The last record after the stages."""
    for stage in stages:
        stage.on_blocks([block])
    return block.records[-1] if block.records else {}


def outputs(block: Block, module: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([call.run(module) for _, call in block.stream.inputs(0)])


@pytest.mark.parametrize("transform", ["none", "scale"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_block_gets_better_at_two_bits(
    name: str, transform: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """And the loss reported is that of what is stored in module and parts."""
    block = first(models[name], tmp_path, "int2-g16-z")
    record = run(block, OmniQuant(transform=transform, **QUICK))
    assert record["kept"]
    assert record["end"] < 0.95 * record["start"], record
    assert block.origin is not None
    outside = torch.linspace(0, 15, 4).round().long()
    got, wanted = outputs(block, block.module), outputs(block, block.origin.module)
    loss = float((got - wanted)[outside].square().mean())
    assert loss == pytest.approx(record["end"], rel=1e-4)
    stored = block.stored()
    for path, layer in block.layers.items():
        assert torch.equal(block.linears[path].weight, layer.dense()), path
        bias = stored.get(f"{path}.bias")
        assert (bias is None) == (layer.bias is None)
        assert bias is None or torch.equal(bias, layer.bias)


@pytest.mark.parametrize(("name", "transform"), [("llama", "scale"), ("gpt2", "scale+shift")])
def test_folded_weights_are_the_block_at_sixteen_bits(
    name: str, transform: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """What the layers are compared with later computes what the original does."""
    block = first(models[name], tmp_path, "int2-g16-z")
    before = {path: layer.weight.clone() for path, layer in block.layers.items()}
    run(block, OmniQuant(transform=transform, **QUICK))
    moved = [
        path for path, layer in block.layers.items() if not torch.equal(layer.weight, before[path])
    ]
    assert len(moved) == len(before) if name == "llama" else len(moved) >= 4
    for path, layer in block.layers.items():
        block.linears[path].weight.data = layer.weight
    assert block.origin is not None
    wanted = outputs(block, block.origin.module)
    torch.testing.assert_close(outputs(block, block.module), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("transform", ["none", "scale"])
def test_earlier_codes_stay_where_nothing_is_better(
    transform: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """Bit for bit, norms included; and never a worse block behind any stage."""
    block = first(models["llama"], tmp_path, "int4-g16-z")
    run(block, methods.get("gptq")())
    before = {path: layer.parts[0] for path, layer in block.layers.items()}
    stored = {name: value.clone() for name, value in block.stored().items()}
    record = run(block, OmniQuant(transform=transform, steps=2, batch=4, clips=5.0, scales=2.0))
    assert not record["kept"]
    assert all(layer.parts == [before[path]] for path, layer in block.layers.items())
    assert all(torch.equal(value, stored[name]) for name, value in block.stored().items())


def test_mixed_plans_keep_sixteen_bit_linears(models: dict[str, Path], tmp_path: Path) -> None:
    """A pair that holds one is left out; the others fold."""
    model = Model.open(models["llama"])
    plan = Plan.uniform(model.shapes, Grid.parse("int2-g16-z"))
    dense = Plan.uniform(model.shapes, Grid("bf16")).targets
    kept = {name for name in plan.targets if name.endswith("k_proj")}
    targets = {n: dense[n] if n in kept else x for n, x in plan.targets.items()}
    found = walked(
        model,
        [OmniQuant(transform="scale", **QUICK)],
        replace(plan, targets=targets),
        tmp_path,
        ids=windows(8),
    )
    for index in range(model.blocks):
        original = model.load(index)
        name = model.block_name(index)
        norms = [f"{part}_layernorm.weight" for part in ("input", "post_attention")]
        same = [torch.equal(found.stored[f"{name}.{x}"], original.get_parameter(x)) for x in norms]
        assert same[0]
        k = found.layers[f"{name}.self_attn.k_proj"]
        weight = original.get_parameter("self_attn.k_proj.weight")
        assert torch.equal(k.dense(), weight.bfloat16().float())
        model.unload(index)


def test_shifts_are_refused_where_no_bias_can_store_them(
    models: dict[str, Path], tmp_path: Path
) -> None:
    block = first(models["llama"], tmp_path, "int3-g16")
    with pytest.raises(ValueError, match=r"biases\nnone of 4 pairs .* input_layernorm -> "):
        run(block, OmniQuant(transform="scale+shift", **QUICK))


def test_it_starts_from_ranges_of_an_earlier_stage(models: dict[str, Path], tmp_path: Path) -> None:
    """Untrained it is what came; with the same steps it ends below min-max that never moved."""
    block = first(models["llama"], tmp_path, "int2-g16-z")
    run(block, RTN())
    before = {path: layer.parts[0] for path, layer in block.layers.items()}
    run(block, OmniQuant(steps=0))
    assert all(layer.parts[0] is before[path] for path, layer in block.layers.items())
    record = run(block, OmniQuant(target="both", **QUICK))
    assert record["end"] < record["start"]


def test_codes_decode_to_the_trained_weight() -> None:
    """What is simulated is what is stored, on every grid."""
    for text in GRIDS:
        made = clip(text)
        with torch.no_grad():
            made.lower.sub_(torch.rand(made.lower.shape) * 3)
            made.upper.sub_(torch.rand(made.upper.shape) * 3)
        made.stepped()
        part, (scale, zero) = made.part(), made.scales()
        assert isinstance(part, Quantized)
        assert torch.equal(part.dense(), made.weight().detach())
        stored = zero.to(part.scales().zero.dtype) if zero is not None else None
        scales = Scales(scale.detach().to(made.grid.scale_dtype), stored)
        codes = encode(made.exact, scales, made.grid)
        assert torch.equal(decode(codes, scales, made.grid), part.dense())


def test_options_out_of_range() -> None:
    for options in ({"clips": -1.0}, {"power": 1.5}, {"scales": -0.1}):
        with pytest.raises(ValueError, match="omniquant: an option is out of range"):
            OmniQuant(**options)
