"""EfficientQAT's Block-AP: where it starts, its gradients by hand, and what training which buys."""

from pathlib import Path

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import PartSpec, Plan, Target
from aptq.engine.affine import AffineKnob
from aptq.engine.block import Block
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.stream import open_stream
from aptq.engine.walk import walk
from aptq.methods.quantize.gptq import GPTQ
from aptq.methods.reconstruct.efficientqat import EfficientQAT
from aptq.model.model import Model
from tests.engine.run import CPU, windows
from tests.methods.test_gptq import layer as calibrated
from tests.tiny import tiny_model

GRIDS = ["int2-g16-z", "int3-g7", "int4-row-fz", "int2-row", "int5-g16-bf16", "int8-g64-fz-bf16"]


def knob(layer: Layer, stage: EfficientQAT | None = None) -> AffineKnob:
    made = (stage or EfficientQAT()).knob(layer, torch.Generator())
    assert isinstance(made, AffineKnob)
    return made


@pytest.mark.parametrize("first", ["rtn", "gptq", ""])
@pytest.mark.parametrize("name", GRIDS)
def test_starts_at_the_part(name: str, first: str) -> None:
    """Of an earlier stage, or at nearest rounding; soft and packed weights are the same."""
    layer, other = calibrated(name), calibrated(name)
    wanted = (methods.get(first or "rtn")()).on_layer(other).parts[0]
    if first:
        layer.parts = [wanted]
    made = knob(layer)
    for key, value in wanted.tensors().items():
        assert torch.equal(made.part().tensors()[key], value), key
    torch.testing.assert_close(made.weight().detach(), wanted.dense())


@pytest.mark.parametrize("name", GRIDS)
def test_packed_is_what_was_trained(name: str) -> None:
    """Wherever the parameters have gone, zeros and scales out of range included."""
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.3, 3.0):
        made = knob(GPTQ().on_layer(calibrated(name)))
        with torch.no_grad():
            for value in made.parameters():
                value.add_(size * torch.randn(value.shape, generator=generator))
        assert torch.equal(made.part().dense(), made.weight().detach())


def test_gradients_on_one_group_by_hand() -> None:
    """dQ/dW = 1 or 0; dQ/ds = round(u) - u or c - z; dQ/dz = 0 or -s (arXiv:2407.11062)."""
    weight = torch.tensor([[-0.5, 0.0, 0.22, 0.31, 1.0]])
    layer = Layer("a.b", "up", weight, None, Target((PartSpec(Grid.parse("int2-row-z")),)))
    made = knob(layer)
    with torch.no_grad():
        made.latent[0, 0], made.latent[0, 4] = -1.8, 2.9  # beyond both ends
    s, z = 0.5, 1.0
    u = made.latent.detach()[0]
    codes = [0, 1, 1, 2, 3]
    for column, code in enumerate(codes):
        value = made.weight()[0, column]
        assert float(value.detach()) == pytest.approx(s * (code - z))
        assert made.zero is not None
        W, gain, zero = torch.autograd.grad(value, (made.latent, made.gain, made.zero))
        free = column not in (0, 4)
        # parameters are W in units of s, and a factor of s
        assert float(W[0, column]) == pytest.approx(s if free else 0.0)
        per_scale = float(u[column].round() - u[column]) if free else code - z
        assert float(gain) == pytest.approx(s * per_scale, abs=1e-6)
        assert float(zero) == pytest.approx(0.0 if free else -s)


def test_latents_keep_their_weight_while_scales_move() -> None:
    made = knob(calibrated("int3-g16-z"))
    with torch.no_grad():
        made.gain.fill_(1.25)
    part, start = made.part(), knob(calibrated("int3-g16-z")).part()
    assert isinstance(part, Quantized)
    assert isinstance(start, Quantized)
    torch.testing.assert_close(part.scale, (1.25 * start.scale.float()).half())
    assert (part.dense() - start.dense()).abs().max() < 2 * part.scale.max()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), torch.float32)


def losses(source: Path, folder: Path, grid: str = "int2-g16-z", **options: float) -> list[float]:
    """Held-out loss (start, end) of the first block."""
    model, done = Model.open(source), list[Block]()
    stream = open_stream(model, windows(16, 24), device=CPU, folder=folder, where="memory")
    stage = EfficientQAT(steps=60, **options)  # type: ignore[arg-type]
    plan = Plan.uniform(model.shapes, Grid.parse(grid))
    walk(model, stream, [stage], plan, sink=done.append)
    (found,) = done[0].records
    return [found["start"], found["end"]]


def test_order_of_what_is_trained(llama: Path, tmp_path: Path) -> None:
    """At 2 bits: everything < scales and zeros < nearest rounding; weights alone between."""
    rates = {"weights": 0.005, "scales": 0.01, "zeros": 0.01, "norms": 1e-3}
    start, everything = losses(llama, tmp_path, **rates)
    _, grids = losses(llama, tmp_path, **{**rates, "weights": 0.0, "norms": 0.0})
    _, weights = losses(llama, tmp_path, weights=0.005, scales=0.0, zeros=0.0, norms=0.0)
    assert everything < grids < 0.9 * start
    assert everything < weights < 0.9 * start


def test_sixteen_bits_have_nothing_to_train(llama: Path, tmp_path: Path) -> None:
    start, end = losses(llama, tmp_path, "bf16")
    assert end <= start < 1e-4


def test_own_defaults_help(llama: Path, tmp_path: Path) -> None:
    start, end = losses(llama, tmp_path)
    assert end < 0.97 * start
