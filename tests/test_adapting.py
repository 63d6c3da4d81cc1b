"""Adapters: made for a text, fit their checkpoint alone, lower the error on that text, come off."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aptq.adapting import adapt
from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.engine.data import Data
from aptq.engine.stage import methods
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.recipe import Recipe
from aptq.runtime.adapter import NOTE, attach, detach
from aptq.runtime.load import load
from aptq.store.headers import hash_file
from tests.engine.run import windows
from tests.tiny import tiny_model

FAMILIES = ["llama", "gpt2", "phi3", "qwen3_moe"]


def made(folder: Path, name: str = "llama") -> tuple[Path, Path, Data]:
    """(model, run of 2 bits, text)."""
    model = tiny_model(name, folder / "model", torch.float32)
    text = folder / "task.txt"
    text.write_text(" ".join(f"task {i} and {i * i}" for i in range(300)), "utf-8")
    data = Data(source=str(text), samples=4, length=16)
    recipe = Recipe(stages=(methods.get("gptq")(),), budget="", data=data)
    plan = Plan.uniform(Model.open(model).shapes, Grid.parse("int2-g16-z"))
    compress(model, folder / "run", recipe=recipe, plan=plan)
    return model, folder / "run", data


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_it_comes_nearer_to_the_original(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from aptq.engine.data import tokens

    source, run, data = made(tmp_path, name)
    adapt(run, source, tmp_path / "a", rank=4, data=data)
    ids = tokens(data, Model.open(source).tokenizer).ids
    wanted = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), ids)
    plain, better = load(run), load(run, adapter=tmp_path / "a")
    near = float((logits(better, ids) - wanted).square().sum())
    assert near < 0.9 * float((logits(plain, ids) - wanted).square().sum())


def test_switching(tmp_path: Path) -> None:
    source, run, data = made(tmp_path)
    adapt(run, source, tmp_path / "a", rank=4, data=data)
    adapt(run, source, tmp_path / "b", rank=2, grid="int8-row", data=data)
    ids = windows(2, 12)
    plain, key = load(run), hash_file(run / "checkpoint" / "aptq.json")
    start = logits(plain, ids)
    found = {}
    for name in ("a", "b", "a"):
        now = logits(attach(plain, tmp_path / name, key), ids)
        assert torch.equal(found.setdefault(name, now), now)
        torch.testing.assert_close(now, logits(load(run, adapter=tmp_path / name), ids))
    assert not torch.allclose(found["a"], found["b"])
    detach(plain)
    assert torch.equal(logits(plain, ids), start)


def test_what_is_refused(tmp_path: Path) -> None:
    source, run, data = made(tmp_path)
    out = adapt(run, source, tmp_path / "a", rank=4, data=data)
    with pytest.raises(ValueError, match="it exists"):
        adapt(run, source, out, data=data)
    with pytest.raises(ValueError, match="no part of a weight"):
        adapt(run, source, tmp_path / "b", rank=0, data=data)
    model, key = load(run), hash_file(run / "checkpoint" / "aptq.json")
    note = json.loads((out / NOTE).read_text())
    layer = next(iter(note["layers"]))
    for change, words in [
        ({"checkpoint": "0" * 64}, "not for this"),
        ({"version": 2}, "version 2"),
        ({"layers": {layer: "int4-g16"}}, "no factors"),
        ({"layers": {"model.embed_tokens": "r4"}}, "no compressed layer"),
        ({"layers": {layer: "r3"}}, "found"),
        ({"more": 1}, "other keys"),
    ]:
        (out / NOTE).write_text(json.dumps(note | change))
        with pytest.raises(ValueError, match=words):
            attach(model, out, key)
    (out / NOTE).write_text(json.dumps(note))
    whole = (out / "adapter.safetensors").read_bytes()
    (out / "adapter.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="cannot be used"):
        attach(model, out, key)
    assert not any(getattr(module, "adapted", False) for module in model.modules())
