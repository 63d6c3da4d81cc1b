"""Plans of GGUF's types: super-blocks where rows are wide enough, 32-wide types elsewhere."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import aptq
from aptq.core.kquants import KQUANTS
from aptq.core.plan import Plan, Target
from aptq.model.model import Model
from aptq.recipe import Recipe
from aptq.runtime.load import dense, load
from aptq.store.checkpoint import Checkpoint
from tests.export.test_gguf import disagreements, tokenizer

RECIPE = """
budget = "4.9bpw"
profile = "gguf"
[data]
samples = 6
length = 24
[measure]
use = "error"
[allocate]
use = "milp"
[[stage]]
use = "gptq"
clip = 0.8
"""
TUNED = '[[stage]]\nuse = "efficientqat"\nsteps = 4\nbatch = 2\n'
TUNED += '[[stage]]\nuse = "e2e_qp"\nsteps = 2\nbatch = 2\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose down projection alone has rows of 256."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    words = tokenizer()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", ["", TUNED], ids=["gptq", "tuned"])
def test_types_by_width(model: Path, more: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(RECIPE + more, "here")
    done = aptq.compress(model, tmp_path / "run", recipe=recipe)
    assert done.bits <= 4.9
    checkpoint = Checkpoint.open(tmp_path / "run")
    for name, target in checkpoint.plan.targets.items():
        assert str(target) not in KQUANTS or name.endswith("down_proj"), (name, str(target))
    assert any(str(target) in KQUANTS for target in checkpoint.plan.targets.values())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        packed = load(tmp_path / "run", kernel="reference")(ids).logits
        plain = dense(tmp_path / "run")(ids).logits
    torch.testing.assert_close(packed, plain, rtol=0.02, atol=0.02)
    aptq.export_to(tmp_path / "run", tmp_path / "model.gguf", to="gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, target in checkpoint.plan.targets.items():
        tensor = found[names.get_name(f"{name}.weight", try_suffixes=(".weight",))]
        if str(target) in KQUANTS:
            assert tensor.tensor_type.name == str(target).upper()
            theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            torch.testing.assert_close(checkpoint.dense(name), theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("text", ["iq4_nl", *KQUANTS])
def test_llama_cpp_reads_the_bytes(text: str, model: Path, tmp_path: Path) -> None:
    """Every type in the engine itself, on the layers that it fits."""
    from tests.export.llamacpp import LlamaCpp

    chosen, shapes = Target.parse(text), Model.open(model).shapes
    targets = {name: chosen if chosen.fits(shape) else Target() for name, shape in shapes.items()}
    aptq.compress(model, tmp_path / "run", recipe="rtn", plan=Plan(targets))
    path = aptq.export_to(tmp_path / "run", tmp_path / "model.gguf", to="gguf")
    ids = tokenizer()("the cat sat on the mat").input_ids
    margin, worst = disagreements(tmp_path / "run", ids, LlamaCpp(path).greedy(ids, 6))
    assert margin < 0.25
    assert worst < 0.1


def test_vllm_s_profile_is_what_its_export_takes(model: Path, tmp_path: Path) -> None:
    """Only down projections [64, 256] consist of its tiles; the others stay 16 bit."""
    pytest.importorskip("compressed_tensors")
    recipe = Recipe.parse(RECIPE.replace("4.9bpw", "14bpw").replace('"gguf"', '"vllm"'), "here")
    aptq.compress(model, tmp_path / "run", recipe=recipe)
    plan = Checkpoint.open(tmp_path / "run").plan
    small = [name for name, x in plan.targets.items() if not (x.kept or str(x) == "bf16")]
    assert small
    assert all(name.endswith("down_proj") for name in small)
    how = {"to": "compressed-tensors", "options": {"target": "vllm"}}
    aptq.export_to(tmp_path / "run", tmp_path / "served", **how)


def test_one_type_for_all_is_refused_by_width(model: Path, tmp_path: Path) -> None:
    recipe = replace(Recipe.parse(RECIPE, "here"), profile="aptq").adapt(grid="q4_k")
    with pytest.raises(ValueError, match="64 columns are no multiple of 256"):
        aptq.compress(model, tmp_path / "run", recipe=recipe)
    assert not (tmp_path / "run").exists()
