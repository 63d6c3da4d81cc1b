"""The loop: streams equal a full forward, order decides who sees whom, and nothing is left over."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.plan import Plan, Target
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.engine.stream import batch_windows, open_stream
from aptq.engine.walk import walk
from aptq.model.dry import record
from aptq.model.model import Model
from aptq.stats.hessian import Hessian
from tests.engine.run import CPU, loaded, walked, windows
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), torch.float32)


def uniform(model: Model, grid: str, keep: tuple[str, ...] = ()) -> Plan:
    return Plan.uniform(model.shapes, Grid.parse(grid), keep)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "qwen3_moe"])
def test_stream_equals_full_forward(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(name, tmp_path / "model", torch.float32)
    model, ids = Model.open(folder), windows()
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: list[torch.Tensor] = []
    last = whole.get_submodule(model.arch.blocks)[-1]
    last.register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        whole(ids, use_cache=False)
    stream = open_stream(model, ids, device=CPU, folder=tmp_path)
    for index, block in enumerate(loaded(model)):
        stream.advance(index, block)
    torch.testing.assert_close(stream.hidden, seen[0], rtol=1e-6, atol=1e-6)


def test_disk_stream_is_the_memory_stream(llama: Path, tmp_path: Path) -> None:
    model = Model.open(llama)
    stage = methods.get("gptq")()
    plan = uniform(model, "int3-g16-z")
    one = walked(model, [stage], plan, tmp_path, where="memory")
    two = walked(model, [stage], plan, tmp_path, where="disk")
    assert two.stream.file is not None
    assert all(torch.equal(one.stored[name], two.stored[name]) for name in one.stored)
    two.stream.close()
    assert not two.stream.file.exists()


def test_last_batch_may_be_shorter(llama: Path, tmp_path: Path) -> None:
    model = Model.open(llama)
    length = 64
    count = batch_windows(length, CPU) + 1
    ids = windows(count, length)
    stream = open_stream(model, ids, device=CPU, folder=tmp_path)
    block = model.load(0)
    stream.advance(0, block)
    alone = open_stream(model, ids[-1:], device=CPU, folder=tmp_path)
    alone.advance(0, block)
    torch.testing.assert_close(stream.hidden[-1:], alone.hidden, rtol=1e-5, atol=1e-6)


def test_recording_leaves_the_blocks_as_they_were(llama: Path) -> None:
    model = Model.open(llama)
    model.load_outer()
    calls = record(model.skeleton, model.arch.blocks, windows(2))
    blocks = model.skeleton.get_submodule(model.arch.blocks)
    assert len(calls) == model.blocks
    assert all("forward" not in block.__dict__ for block in blocks.children())


@dataclass(frozen=True, kw_only=True)
class Spy(Stage):
    """Rounds like rtn and keeps the second moments it was shown."""

    first: float = 0.0

    def needs(self) -> tuple[Hessian, ...]:
        return (Hessian(first=self.first),)

    def on_layer(self, layer: Layer) -> Layer:
        stat = layer.stats[self.needs()[0]]
        assert isinstance(stat, Hessian)
        MOMENTS[layer.name] = stat.matrix().clone()
        WEIGHTS[layer.name] = float(stat.sums["weight"])
        return methods.get("rtn")().on_layer(layer)


MOMENTS: dict[str, torch.Tensor] = {}
WEIGHTS: dict[str, float] = {}


@pytest.mark.parametrize("order", ["block", "group"])
def test_order_decides_what_later_groups_see(order: str, llama: Path, tmp_path: Path) -> None:
    """In "group" order o_proj is calibrated behind rounded q, k, v; in "block" order it is not."""
    model = Model.open(llama)
    name = "model.layers.0.self_attn.o_proj"
    MOMENTS.clear()
    walked(model, [Spy()], uniform(model, "int2-row-z"), tmp_path, order=order)  # type: ignore[arg-type]
    compressed = MOMENTS[name]
    MOMENTS.clear()
    walked(model, [Spy()], uniform(model, "int8-g16-z"), tmp_path, order=order)  # type: ignore[arg-type]
    nearly = MOMENTS[name]
    same = torch.allclose(compressed, nearly, rtol=1e-3)
    assert same == (order == "block")


def test_later_blocks_see_compressed_earlier_ones(llama: Path, tmp_path: Path) -> None:
    model = Model.open(llama)
    MOMENTS.clear()
    walked(model, [Spy()], uniform(model, "int2-row-z"), tmp_path)
    coarse = dict(MOMENTS)
    walked(model, [Spy()], uniform(model, "int8-g16-z"), tmp_path)
    first, second = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    assert torch.equal(coarse[first], MOMENTS[first])
    assert not torch.allclose(coarse[second], MOMENTS[second], rtol=1e-3)


def test_kept_layers_are_stored_as_they_are(llama: Path, tmp_path: Path) -> None:
    model = Model.open(llama)
    plan = uniform(model, "int4-g16-z", ("*.down_proj",))
    result = walked(model, [methods.get("rtn")()], plan, tmp_path)
    name = "model.layers.1.mlp.down_proj"
    assert name not in result.layers
    original = model.load(1).get_submodule("mlp.down_proj").weight
    assert torch.equal(result.stored[f"{name}.weight"], original)
    assert f"{name}.parts.0.codes" not in result.stored


def test_a_recipe_that_quantizes_nothing_is_refused(llama: Path, tmp_path: Path) -> None:
    model = Model.open(llama)
    with pytest.raises(ValueError, match="unfinished"):
        walked(model, [Stage()], uniform(model, "int4-g16-z"), tmp_path)


def test_second_stage_works_on_what_the_first_left(llama: Path, tmp_path: Path) -> None:
    model = Model.open(llama)
    rtn, svd = methods.get("rtn")(), methods.get("svd")()
    once = walked(model, [rtn], uniform(model, "int3-g16-z"), tmp_path)
    sums = Plan(dict.fromkeys(model.shapes, Target.parse("int3-g16-z+r8")))
    twice = walked(model, [rtn, svd], sums, tmp_path)
    for name, layer in twice.layers.items():
        assert len(layer.parts) == 2
        assert layer.error() < 0.9 * once.layers[name].error()


@pytest.mark.parametrize("names", [("rtn", "rtn"), ("svd",)])
def test_other_parts_than_planned_are_refused(
    names: tuple[str, ...], llama: Path, tmp_path: Path
) -> None:
    model = Model.open(llama)
    plan = Plan(dict.fromkeys(model.shapes, Target.parse("int3-g16-z+o2%")))
    with pytest.raises(ValueError, match="unfinished"):
        walked(model, [methods.get(name)() for name in names], plan, tmp_path)


def test_tokens_of_experts_are_known(tmp_path: Path) -> None:
    """Weighting the first token reaches experts: their rows are traced back to positions."""
    model = Model.open(tiny_model("mixtral", tmp_path / "moe", torch.float32))
    plan = uniform(model, "int4-g16-z")
    walked(model, [Spy(first=0.5)], plan, tmp_path, ids=windows(4, 12))
    totals = [
        weight
        for name, weight in WEIGHTS.items()
        if "layers.1.mlp.experts" in name and name.endswith("gate_proj")
    ]
    # two experts a token: 48 tokens, of which 4 first ones count 6 times
    assert sum(totals) == 2 * (48 + 4 * 5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_passes_end_where_nothing_more_is_wanted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many batches, of which the later ones are cut short, show what a single one shows."""
    model = Model.open(tiny_model(name, tmp_path))
    ids, plan, found, runs = windows(4), uniform(model, "int8-g16-z"), [], []
    plain = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        runs[-1] += 1
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    for batch in (4, 1):
        MOMENTS.clear()
        stream = open_stream(model, ids, device=CPU, folder=tmp_path, where="memory", batch=batch)
        runs.append(0)
        walk(model, stream, [Spy()], plan, sink=lambda _: None)
        found.append(dict(MOMENTS))
    for path, moment in found[0].items():
        torch.testing.assert_close(found[1][path], moment, rtol=1e-4, atol=1e-6)
    spared = 3 * model.blocks  # the last linear of all batches but the first
    assert name == "mixtral" or runs[1] == 4 * runs[0] - spared
