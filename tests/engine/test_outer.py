"""Embeddings and heads as planned layers: what they are compressed against, and what comes out."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import Plan, Target
from aptq.core.rounding import fit, shrinks, snap
from aptq.engine import outer as module
from aptq.engine.layer import Layer
from aptq.engine.outer import Outer, head_inputs
from aptq.engine.stage import Stage
from aptq.engine.stat import Seen
from aptq.engine.stream import open_stream
from aptq.methods.quantize.gptq import GPTQ
from aptq.methods.quantize.rtn import RTN
from aptq.model.model import Model
from aptq.runtime.load import dense, load
from aptq.stats.hessian import Hessian
from aptq.store.checkpoint import Checkpoint
from aptq.store.predict import predict
from tests.engine.outer import compressed
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model, tiny_tokens

GRID3 = Target.parse("int3-g16")
FAMILIES = ["llama", "qwen2", "gemma3", "gpt2", "opt", "cohere2", "granite", "phi3"]
UNTIED = ("llama", "phi3", "granite")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(tiny_tokens()).logits
    return found


def original(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_as_predicted_and_all_loaders_agree(name: str, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path)
    head = "int3-g20" if name in UNTIED else None
    run = compressed(source, tmp_path / "out", [RTN()], "int4-g16-z", head)
    assert run.model.head_tied == (head is None)
    sizes = {path.name: path.stat().st_size for path in run.folder.iterdir()}
    assert predict(run.model, run.plan).files == sizes
    assert len(run.outer.records) == (1 if head is None else 2)
    found = Checkpoint.open(run.folder)
    found.verify()
    embed = run.model.arch.embed
    parts = {key for key in found.specs if ".parts." in key and not key.startswith("model.layers")}
    assert {f"{embed}.parts.0.{key}" for key in ("codes", "scale", "zero")} <= parts
    assert not any(key.startswith(f"{embed}.weight") for key in found.specs)
    assert any(key.startswith("lm_head") for key in found.specs) == (head is not None)
    # the reference: the dense model with the same snapped weights
    wanted = dense(run.folder)
    weight = wanted.get_input_embeddings().weight
    assert torch.equal(weight, found.dense(embed))
    assert (wanted.get_output_embeddings().weight is weight) == (head is None)
    assert not torch.equal(weight, original(source).get_input_embeddings().weight)
    for model in (load(run.folder, kernel="reference"), load(run.folder)):
        assert torch.allclose(logits(model), logits(wanted), atol=1e-5)
    through_transformers = AutoModelForCausalLM.from_pretrained(run.folder)
    assert torch.allclose(logits(through_transformers), logits(wanted), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_bits_do_not_know_of_them(name: str, tmp_path: Path) -> None:
    model = Model.open(tiny_model(name, tmp_path))
    inside = Plan.uniform(model.shapes, Grid.parse("int4-g16-z"))
    outside = {name: Target.parse("int2-row") for name in model.outer_shapes}
    plan = Plan({**inside.targets, **outside})
    one, two = predict(model, inside), predict(model, plan)
    assert (one.bits, one.linear_bytes) == (two.bits, two.linear_bytes)
    saved = sum(4 * rows * columns for rows, columns in model.outer_shapes.values())
    assert one.total - 1.1 * saved < two.total < one.total - 0.8 * saved
    kept = Plan({**inside.targets, **dict.fromkeys(model.outer_shapes, Target())})
    assert predict(model, kept).bits == one.bits


def test_the_head_sees_what_the_compressed_model_gives_it(tmp_path: Path) -> None:
    source, ids = tiny_model("llama", tmp_path), windows(5)
    run = compressed(source, tmp_path / "out", [GPTQ()], "int4-g16-z", "int3-g16", ids)
    model, seen = dense(run.folder), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    X = seen[0].reshape(-1, 48)
    W = original(source).lm_head.weight.detach()
    hessian = Hessian().start(48, CPU)
    hessian.update(Seen(X, None, 1))
    layer = Layer("lm_head", "head", W, None, Target.parse("int3-g16"), {Hessian(): hessian})
    wanted = GPTQ().on_layer(layer).dense()
    found = Checkpoint.open(run.folder).dense("lm_head")
    differing = (wanted - found).abs() > 1e-6
    assert float(differing.float().mean()) < 0.01  # roundings of sums may tip a code
    rounded = snap(W, fit(W, layer.target.grid), layer.target.grid)

    def damage(Q: Tensor) -> float:
        return float((X @ (Q - W).T).square().sum())

    assert damage(found) < 0.8 * damage(rounded)


@pytest.mark.parametrize("name", ["gemma3", "granite", "opt", "gpt2", "cohere2"])
def test_head_inputs_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    source, ids = tiny_model(name, tmp_path), windows(3)
    whole, seen = original(source), []
    whole.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        whole(ids)
    model = Model.open(source)
    stream = open_stream(model, ids, device=CPU, folder=tmp_path)
    for index in range(model.blocks):
        stream.advance(index, model.load(index))
        model.unload(index)
    model.load_outer()
    found = head_inputs(model, stream.hidden)
    assert torch.allclose(found, seen[0], atol=1e-5)
    assert model.skeleton.lm_head.forward.__func__ is nn.Linear.forward  # nothing stays patched


def test_an_untied_embedding_is_rounded_row_by_row(tmp_path: Path) -> None:
    """Its inputs are one-hot: no columns to compensate, only the clip search is left."""
    source = tiny_model("llama", tmp_path)
    run = compressed(source, tmp_path / "out", [GPTQ(clip=0.5)], "int3-g16-z")
    W = original(source).get_input_embeddings().weight.detach()
    grid = Target.parse("int3-g16-z").grid
    assert grid is not None
    wanted = snap(W, fit(W, grid, shrink=shrinks(0.5)), grid)
    assert torch.equal(Checkpoint.open(run.folder).dense("model.embed_tokens"), wanted)
    assert run.outer.records[0]["role"] == "embed"
    assert run.outer.records[0]["error"] == pytest.approx(
        float((wanted - W).square().sum() / W.square().sum())
    )


def test_a_tied_embedding_is_compressed_for_both_of_its_uses(tmp_path: Path) -> None:
    source, ids = tiny_model("qwen2", tmp_path), windows(8)
    whole, seen = original(source), []
    whole.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        whole(ids)
    X, W = seen[0].reshape(-1, 48), whole.lm_head.weight.detach()
    run = compressed(source, tmp_path / "out", [GPTQ()], "int3-g16", None, ids)
    E = Checkpoint.open(run.folder).dense("model.embed_tokens") - W
    grid = Target.parse("int3-g16").grid
    assert grid is not None
    rounded = snap(W, fit(W, grid), grid) - W
    H = X.T @ X
    both = H + H.diagonal().mean() * torch.eye(48)

    def cost(error: Tensor, metric: Tensor) -> float:
        return float(((error @ metric) * error).sum())

    assert cost(E, both) < cost(rounded, both)
    assert cost(E, H) < cost(rounded, H)
    hessian = Hessian().start(48, CPU)
    hessian.sums["h"] += both.triu()
    hessian.sums["weight"] += 1
    layer = Layer("x", "embed", W, None, Target.parse("int3-g16"), {Hessian(): hessian})
    wanted = GPTQ().on_layer(layer).dense() - W
    assert float(((wanted - E).abs() > 1e-6).float().mean()) < 0.01


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2"])
def test_both_streams_start_from_it(name: str, tmp_path: Path) -> None:
    source, ids = tiny_model(name, tmp_path), windows(2)
    run = compressed(source, tmp_path / "out", [RTN()], "int2-row-z", None, ids)
    stream = open_stream(run.model, ids, device=CPU, folder=tmp_path)
    model = original(source)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            Checkpoint.open(run.folder).dense(run.model.arch.embed)
        )
        wanted = model(ids, output_hidden_states=True).hidden_states[0]
    assert torch.allclose(stream.hidden, wanted, atol=1e-6)
    run.model.load_outer()
    tables = run.model.skeleton.get_input_embeddings(), run.model.skeleton.get_output_embeddings()
    assert torch.equal(tables[0].weight, model.get_input_embeddings().weight)
    assert tables[0].weight is tables[1].weight
    run.model.unload_outer()
    run.model.replace_outer({})
    fresh = open_stream(run.model, ids, device=CPU, folder=tmp_path)
    assert not torch.allclose(fresh.hidden, wanted, atol=1e-2)


@pytest.mark.parametrize("grid", ["int3-g7-z", "int4-row-z", "int5-g20-fz", "int2-g16", "bf16"])
@pytest.mark.parametrize("stage", [RTN(), GPTQ()])
def test_slices_of_rows_change_nothing(
    grid: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model("llama", tmp_path)
    whole = compressed(source, tmp_path / "whole", [stage], grid, grid)
    monkeypatch.setattr(module, "SLICE", 48 * 24)
    sliced = compressed(source, tmp_path / "sliced", [stage], grid, grid)
    assert len(sliced.outer.records) == 2
    for one, two in zip(whole.outer.records, sliced.outer.records, strict=True):
        assert one["error"] == pytest.approx(two["error"], rel=1e-3)
        assert (one["after"], one["counts"]) == (two["after"], two["counts"])
    for name, (part,) in sliced.outer.parts.items():
        assert part.shape == (260, 48)
        same = part.dense() == whole.outer.parts[name][0].dense()
        assert float(same.float().mean()) > 0.99  # sums of products in another order tip codes


def test_sixteen_bits_ask_nothing_of_the_stages(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    run = compressed(source, tmp_path / "out", [RTN()], "bf16", "keep")
    W = original(source).get_input_embeddings().weight
    assert torch.equal(
        Checkpoint.open(run.folder).dense("model.embed_tokens"), W.bfloat16().float()
    )
    kept = Checkpoint.open(run.folder).layer("lm_head")[0].dense()
    assert torch.equal(kept, original(source).lm_head.weight)
    assert [*run.outer.parts] == ["model.embed_tokens"]


@dataclass(frozen=True, kw_only=True)
class Weighted(GPTQ):
    """GPTQ whose rows are weighted by gradient profiles, which outer layers have none of."""

    def needs(self) -> tuple[Hessian, ...]:
        return (Hessian(rows="gradient"),)


@pytest.mark.parametrize("stage", [GPTQ(first=0.25), Weighted()])
def test_a_token_of_the_head_is_a_window_of_its_own(stage: Stage, tmp_path: Path) -> None:
    """No weight of positions or profiles: what leaves the last block reaches no other token."""
    model = Model.open(tiny_model("qwen2", tmp_path))
    plan = Plan({**dict.fromkeys(model.shapes, Target()), "model.embed_tokens": GRID3})
    found = []
    for stages in ([stage], [GPTQ()]):
        outer = Outer(model, plan, stages, CPU)
        outer.compress_embedding(windows(4), folder=tmp_path)
        found.append(outer.parts["model.embed_tokens"][0].dense())
    assert float((found[0] == found[1]).float().mean()) > 0.99


def test_what_is_logged(tmp_path: Path) -> None:
    run = compressed(tiny_model("llama", tmp_path), tmp_path / "out", [GPTQ()], "int8-row", "bf16")
    embed, head = run.outer.records
    assert (embed["name"], embed["role"], embed["grid"]) == (
        "model.embed_tokens",
        "embed",
        "int8-row",
    )
    assert embed["weights"] == 260 * 48
    assert embed["before"] == 4 * 260 * 48
    assert embed["after"] == 260 * 48 + 2 * 260
    assert 0 < embed["error"] < 1e-4
    assert head["after"] == 2 * 260 * 48
    assert isinstance(run.outer.parts["model.embed_tokens"][0], Quantized)


def test_a_recipe_that_does_not_quantize_is_refused(tmp_path: Path) -> None:
    model = Model.open(tiny_model("llama", tmp_path))
    targets = {**dict.fromkeys(model.shapes, Target()), "lm_head": Target.parse("int4-row")}
    targets["model.embed_tokens"] = Target.parse("int4-row")
    outer = Outer(model, Plan(targets), [Stage()], CPU)
    with pytest.raises(ValueError, match=r"(?s)uncompressed\nmodel\.embed_tokens.*gptq") as caught:
        outer.compress_embedding(None, folder=tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def test_a_plan_without_them_changes_nothing(tmp_path: Path) -> None:
    source = tiny_model("qwen2", tmp_path)
    run = compressed(source, tmp_path / "out", [RTN()], None)
    assert not run.outer.records
    assert not run.outer.tensors()
    found = Checkpoint.open(run.folder).tensor("model.embed_tokens.weight")
    assert torch.equal(found, original(source).get_input_embeddings().weight)
    assert b"outer" not in (run.folder / "aptq.json").read_bytes()
