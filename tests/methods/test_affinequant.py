"""AffineQuant: matrices between v and o that fold, open band by band, and can be inverted."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.core.transform import LEAST
from aptq.engine.block import Block
from aptq.engine.clip import Folded
from aptq.engine.origin import Origin
from aptq.engine.stage import methods
from aptq.engine.stream import open_stream
from aptq.methods.reconstruct.affinequant import (
    DOMINANT,
    Affine,
    AffineQuant,
    dominance,
    dominant,
    gradual,
)
from aptq.methods.reconstruct.omniquant import OmniQuant
from aptq.model.model import Model
from tests.engine.run import CPU, walked, windows
from tests.tiny import tiny_model

FAMILIES = ("llama", "gpt2", "qwen3", "mixtral", "gpt_neox")
QUICK: dict[str, Any] = {"steps": 60, "batch": 4, "held": 0.25, "clips": 5e-2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tiny")
    return {name: tiny_model(name, base) for name in FAMILIES}


def first(source: Path, folder: Path, grid: str = "int2-g16-z", count: int = 16) -> Block:
    """Block 0 with its stream and its original."""
    model = Model.open(source)
    stream = open_stream(model, windows(count), device=CPU, folder=folder, where="memory")
    stream.learn(model, {4, 8})
    plan = Plan.uniform(model.shapes, Grid.parse(grid))
    module, name, groups = model.load(0), model.block_name(0), model.groups(0)
    origin = Origin(0, name, module, stream.twin())
    return Block(0, name, module, groups, plan, stream, "block", None, origin)


def outputs(block: Block, module: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([call.run(module) for _, call in block.stream.inputs(0)])


@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
def test_the_mask_opens_from_the_diagonal_to_everything(epochs: int) -> None:
    masks = [gradual(12, epoch, epochs, 0.5) for epoch in range(epochs)]
    if epochs > 1:
        assert torch.equal(masks[0], torch.eye(12))
    assert torch.equal(masks[-1], torch.full((12, 12), 0.5).fill_diagonal_(1.0))
    for before, after in itertools.pairwise(masks):
        assert (after >= before).all()
    if epochs == 5:  # floor(11 / 4) + 1 = 3 bands
        assert masks[1][0].tolist() == [1.0, 0.5, 0.5] + [0.0] * 9
        assert torch.equal(masks[1], masks[1].T)


def test_dominance_is_made_and_kept() -> None:
    """Of any matrix; of one that has it nothing changes but what the bound on the diagonal asks."""
    made = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0))
    made[0, 0, 0], made[1, 3, 3], made[2, 2, 2] = 0.0, -1e-4, -2.0
    mask = gradual(12, 2, 5, 1.0)
    found = dominant(made, mask)
    assert (dominance(made * mask) < 0).any()
    least = (1 - DOMINANT) * (found * mask).diagonal(dim1=-2, dim2=-1).abs()
    assert (dominance(found * mask) >= 0.99 * least).all()
    assert least.min() >= 0.99 * (1 - DOMINANT) * LEAST
    assert torch.linalg.cond(found * mask).isfinite().all()
    torch.testing.assert_close(dominant(found, mask), found)
    sure = torch.eye(12) + 0.01 * made
    assert torch.equal(dominant(sure, mask), sure)
    small = torch.eye(12) + 1e-5 * made  # entries beside the diagonal are not bounded
    assert torch.equal(dominant(small, mask), small)


@pytest.mark.parametrize("stability", [1e-2, 1.0])
def test_matrices_stay_dominant_while_they_are_trained(
    stability: float, models: dict[str, Path], tmp_path: Path
) -> None:
    """At rates far above the default: at every step, and the mask is open in the end."""
    block = first(models["llama"], tmp_path)
    stage = AffineQuant(scales=0.1, stability=stability, epochs=5, **QUICK)
    knobs = stage.open(block, torch.Generator())
    assert isinstance(knobs, Folded)
    affine = next(x for x in knobs.transforms if isinstance(x, Affine))
    assert affine.scale.shape == (2, 12, 12)
    seen = []
    stepped = knobs.stepped

    def watch() -> None:
        stepped()
        seen.append((dominance(affine.factor().detach()).min(), affine.mask.clone()))

    knobs.stepped = watch  # type: ignore[method-assign]
    tuned = stage.fit([block], [knobs], torch.Generator().manual_seed(0))
    assert tuned is not None
    assert tuned.restarts == 0
    assert len(seen) == 60
    assert min(float(least) for least, _ in seen) > 0
    assert torch.equal(seen[10][1], torch.eye(12))
    assert (seen[-1][1] > 0).all()


def test_closed_it_is_omniquant(models: dict[str, Path], tmp_path: Path) -> None:
    """With stability 0 the same losses and the same folded weights as scales alone."""
    found = []
    for stage in (AffineQuant(stability=0.0, **QUICK), OmniQuant(transform="scale", **QUICK)):
        block = first(models["llama"], tmp_path)
        stage.on_blocks([block])
        found.append((block.records[-1], {n: x.weight for n, x in block.layers.items()}))
    (ours, weights), (theirs, wanted) = found
    # matrices are solved for where scales divide: codes at a border fall to either side
    assert ours["start"] == theirs["start"]
    assert ours["end"] == pytest.approx(theirs["end"], rel=1e-2)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_block_gets_better_and_its_function_stays(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """At two bits; the folded weights without rounding compute what the original does."""
    block = first(models[name], tmp_path)
    AffineQuant(stability=1.0, **QUICK).on_blocks([block])
    record = block.records[-1]
    assert record["kept"]
    assert record["end"] < 0.95 * record["start"], record
    assert block.origin is not None
    wanted = outputs(block, block.origin.module)
    assert float((outputs(block, block.module) - wanted).abs().max()) > 0.05
    for path, layer in block.layers.items():
        block.linears[path].weight.data = layer.weight
    torch.testing.assert_close(outputs(block, block.module), wanted, rtol=1e-4, atol=5e-5)


def test_matrices_beat_scales(models: dict[str, Path], tmp_path: Path) -> None:
    """At equal steps and rates, in the loss on windows that neither was trained on.

    Over two families together: alone either may come out a few per cent worse.
    """
    effort: dict[str, Any] = {"steps": 200, "batch": 8, "held": 0.25}
    ratio = 1.0
    for name in ("llama", "qwen3"):
        ends = []
        for stage in (AffineQuant(**effort), OmniQuant(transform="scale", **effort)):
            block = first(models[name], tmp_path, count=64)
            stage.on_blocks([block])
            ends.append(block.records[-1]["end"])
        ratio *= ends[0] / ends[1]
    assert ratio < 0.97


def test_earlier_codes_stay_where_nothing_is_better(
    models: dict[str, Path], tmp_path: Path
) -> None:
    block = first(models["llama"], tmp_path, "int4-g16-z")
    methods.get("gptq")().on_blocks([block])
    before = {name: value.clone() for name, value in block.stored().items()}
    AffineQuant(steps=2, batch=4, clips=5.0, scales=2.0).on_blocks([block])
    assert not block.records[-1]["kept"]
    assert all(torch.equal(value, before[name]) for name, value in block.stored().items())


def test_sixteen_bits_and_options(models: dict[str, Path], tmp_path: Path) -> None:
    model = Model.open(models["llama"])
    plan = Plan.uniform(model.shapes, Grid("bf16"))
    found = walked(model, [AffineQuant(**QUICK)], plan, tmp_path, ids=windows(8))
    for index in range(model.blocks):
        for name, value in model.load(index).named_parameters():
            full = f"{model.block_name(index)}.{name}"
            if full in found.stored:
                assert torch.equal(found.stored[full], value), name
        model.unload(index)
    for options in ({"epochs": 0}, {"stability": -1.0}):
        with pytest.raises(ValueError, match="affinequant: an option is out of range"):
            AffineQuant(**options)  # type: ignore[arg-type]
