"""A model opened block by block computes what transformers computes from the same folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aptq.model.dry import record
from aptq.model.model import Model
from tests.tiny import TABLE, TINY, TRACED, tiny_model, tiny_tokens

_EXPERTS = {"mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"}


def _reference(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_experts_implementation("eager")  # what the unfused experts follow
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def _walk(model: Model, ids: Tensor) -> Tensor:
    """One block in memory at a time, from recorded arguments, then norm and head."""
    model.load_outer()
    calls = record(model.skeleton, model.arch.blocks, ids)
    hidden = calls[0].hidden
    for index, call in enumerate(calls):
        block = model.load(index)
        assert not any(tensor.is_meta for tensor in block.parameters())
        args = (hidden, *call.args[1:]) if call.args else ()
        kwargs = call.kwargs if call.args else {**call.kwargs, "hidden_states": hidden}
        hidden = block(*args, **kwargs)
        model.unload(index)
    last = model.skeleton.get_submodule(model.arch.blocks)[-1]
    handle = last.register_forward_hook(lambda *_: hidden)
    last.forward = lambda *args, **kwargs: hidden
    for block in model.skeleton.get_submodule(model.arch.blocks)[:-1]:
        block.forward = lambda *args, **kwargs: hidden
    logits: Tensor = model.skeleton(ids, use_cache=False).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("name", [*TABLE, *TRACED])
def test_walk_equals_the_full_forward(name: str, folder_of: Callable[[str], Path]) -> None:
    folder, ids = folder_of(name), tiny_tokens()
    walked, whole = _walk(Model.open(folder), ids), _reference(folder, ids)
    assert whole.std() > 0.02  # not trivially equal
    if name in _EXPERTS:
        torch.testing.assert_close(walked, whole, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(walked, whole)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_walk_in_bf16(name: str, tmp_path: Path) -> None:
    folder, ids = tiny_model(name, tmp_path, torch.bfloat16), tiny_tokens()
    model = Model.open(folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(_walk(model, ids), _reference(folder, ids))


@pytest.mark.parametrize("name", [*TABLE, *TRACED])
def test_names_shapes_and_counts(name: str, folder_of: Callable[[str], Path]) -> None:
    model = Model.open(folder_of(name))
    config = TINY[name]()
    assert model.blocks == config.num_hidden_layers
    names = []
    for index in range(model.blocks):
        block = model.load(index)
        for group in model.groups(index):
            for layer in group.layers.values():
                linear = block.get_submodule(layer.removeprefix(f"{model.block_name(index)}."))
                assert type(linear) is nn.Linear
                assert model.shapes[layer] == (linear.out_features, linear.in_features)
                assert not linear.weight.requires_grad
                names.append(layer)
        assert not block.training
        model.unload(index)
    assert names == list(model.shapes)
    assert len(set(names)) == len(names)
    whole = AutoModelForCausalLM.from_config(config)
    whole.tie_weights()
    assert model.coverage.total == sum(tensor.numel() for tensor in whole.parameters())


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    model = Model.open(tiny_model("qwen2", tmp_path))
    assert model.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in model.outer_names()
    model.load_outer()
    embed, head = (model.skeleton.get_parameter(name) for name in model.tied.popitem()[::-1])
    assert embed is head
    assert not embed.is_meta


def test_unload_outer_frees_and_keeps_the_tie(tmp_path: Path) -> None:
    model = Model.open(tiny_model("qwen2", tmp_path))
    model.load_outer()
    model.unload_outer()
    assert all(tensor.is_meta for tensor in model.skeleton.parameters())
    head, embed = (model.skeleton.get_parameter(name) for name in next(iter(model.tied.items())))
    assert head is embed
    model.load_outer()
    assert not model.skeleton.get_parameter("lm_head.weight").is_meta


def _with_head(folder: Path, change: float) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_stored_copy_of_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = Model.open(_with_head(tiny_model("qwen2", tmp_path), 0.0))
    assert model.tied


def test_a_different_stored_head_is_not_tied(tmp_path: Path) -> None:
    folder, ids = _with_head(tiny_model("qwen2", tmp_path), 0.5), tiny_tokens()
    model = Model.open(folder)
    assert not model.tied
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight" in model.outer_names()
    assert torch.equal(_walk(model, ids), _reference(folder, ids))


def test_sharded_equals_single(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    sharded = tiny_model("llama", tmp_path, shard_size="50KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one, two = Model.open(folder_of("llama")).load(1), Model.open(sharded).load(1)
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)


def test_dtype_can_be_chosen(folder_of: Callable[[str], Path]) -> None:
    model = Model.open(folder_of("llama"), dtype=torch.float16)
    assert {tensor.dtype for tensor in model.load(0).parameters()} == {torch.float16}


def test_blocks_are_independent_of_each_other(folder_of: Callable[[str], Path]) -> None:
    model = Model.open(folder_of("mixtral"))
    first = model.load(0)
    weight = first.get_submodule("mlp.experts.1.up_proj").weight
    kept = weight.clone()
    model.load(1)
    model.unload(1)
    assert torch.equal(weight, kept)
    model.unload(0)
    again = model.load(0).get_submodule("mlp.experts.1.up_proj").weight
    assert torch.equal(again, kept)


def test_tokenizer_and_carried_files(llama: Path) -> None:
    model = Model.open(llama)
    assert len(model.tokenizer("ab").input_ids) == 2
    names = {path.name for path in model.files()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert "model.safetensors" not in names
    assert "config.json" not in names


def test_a_folder_without_tokenizer(llama: Path) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()
    model = Model.open(llama)
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        _ = model.tokenizer


_MEMORY = """
import sys, torch
from pathlib import Path
from aptq.model.model import Model
torch.set_num_threads(1)

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

for folder in sys.argv[1:]:
    model = Model.open(folder)
    model.unload((model.load(0), 0)[1])
    start, held = anonymous(), []
    for index in range(model.blocks):
        block = model.load(index)
        held.append(anonymous() - start)
        model.unload(index)
        size = sum(tensor.nbytes for tensor in block.parameters())
        del block
    print(max(held) / size, (anonymous() - start) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_one_block_in_memory(tmp_path: Path) -> None:
    """Mapped blocks cost no anonymous memory, converted ones their own size; all is freed."""
    for name in ("llama", "mixtral"):
        config = TINY[name]()
        size = 1024 if name == "llama" else 512
        config.update({"hidden_size": size, "intermediate_size": 2 * size})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("llama", "mixtral")]
    script = [sys.executable, "-c", _MEMORY, *folders]
    # glibc would keep freed pieces of its heap; blocks this small must come from mmap to be seen.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(script, env=fixed, check=True, capture_output=True, text=True)
    printed = ran.stdout
    mapped, converted = (tuple(map(float, line.split())) for line in printed.splitlines())
    assert mapped[0] < 0.2, printed
    assert converted[0] < 1.5, printed
    assert max(mapped[1], converted[1]) < 0.2, printed
