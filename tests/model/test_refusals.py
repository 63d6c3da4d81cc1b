"""Everything that cannot be compressed correctly is refused in three lines, before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aptq.model.model import Model
from tests.tiny import tiny_model


def refusal(source: Path | str, **options: Any) -> str:
    """The message of Model.open, which must be three lines: what, where, what to do."""
    with pytest.raises(ValueError, match="\n") as caught:
        Model.open(source, **options)
    message = str(caught.value)
    assert len(message.split("\n")) == 3, message
    return message


def _configure(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_pickled_weights(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    message = refusal(llama)
    assert "pickles" in message
    assert "pytorch_model.bin" in message
    assert "safetensors" in message.split("\n")[2]


def test_remote_code(llama: Path) -> None:
    message = refusal(_configure(llama, auto_map={"AutoModelForCausalLM": "modeling_x.XForLM"}))
    assert "modeling_x.XForLM" in message


def test_remote_code_of_a_family_that_transformers_has_adopted(llama: Path) -> None:
    entry = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    assert Model.open(_configure(llama, auto_map=entry)).blocks == 2


@pytest.mark.parametrize("method", ["awq", "fp8", "mxfp4"])
def test_quantized_source(llama: Path, method: str) -> None:
    message = refusal(_configure(llama, quantization_config={"quant_method": method}))
    assert f"already quantized ({method})" in message


def test_packed_integers_without_a_config(llama: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    assert "of type I8, model.layers.0.mlp.up_proj.weight" in refusal(_rewrite(llama, pack))


def test_missing_shard(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, shard_size="50KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refusal(folder)
    assert "a shard of the model is missing" in message
    assert shard.name in message
    assert "layers" in message  # the tensors it held


def test_shard_outside_the_folder(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, shard_size="50KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = next(iter(index["weight_map"].values()))
    (folder.parent / "outside.safetensors").write_bytes((folder / shard).read_bytes())
    where = {
        name: "../outside.safetensors" if s == shard else s
        for name, s in index["weight_map"].items()
    }
    file.write_text(json.dumps({**index, "weight_map": where}))
    assert "outside.safetensors" in refusal(folder)


def test_index_disagrees_with_a_shard(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, shard_size="50KB")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"]["model.norm.weight"]
    file.write_text(json.dumps(index))
    message = refusal(folder)
    assert "disagree" in message
    assert "model.norm.weight" in message


def test_index_that_is_no_json(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, shard_size="50KB")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "cannot read the list of shards" in refusal(folder)


@pytest.mark.parametrize("keep", [-1000, 100, 4, 0])
def test_truncated_file(llama: Path, keep: int) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    message = refusal(llama)
    assert "damaged or cut off" in message
    assert f"{len(data[:keep]):,} bytes" in message
    if keep == -1000:
        assert f"{len(data):,} expected" in message


@pytest.mark.parametrize("head", [b"\xff" * 8, (1 << 62).to_bytes(8, "little")])
def test_hostile_header(llama: Path, head: bytes) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(head + file.read_bytes()[8:])
    assert "damaged" in refusal(llama)


def test_missing_tensors(llama: Path) -> None:
    message = refusal(_rewrite(llama, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))
    assert "1 missing, model.layers.1.mlp.up_proj.weight" in message


def test_missing_expert(tmp_path: Path) -> None:
    """One of many stored tensors that become one fused tensor: seen when the block is loaded."""
    folder = tiny_model("mixtral", tmp_path)
    names = load_file(folder / "model.safetensors")
    name = next(n for n in names if n.startswith("model.layers.0.") and "w1" in n)
    _rewrite(folder, lambda tensors: tensors.pop(name))
    model = Model.open(folder)
    with pytest.raises(ValueError, match="do not fit the architecture"):
        model.load(0)


def test_unknown_tensors(llama: Path) -> None:
    message = refusal(_rewrite(llama, lambda t: t.update(extra=torch.zeros(1))))
    assert "1 tensors, extra" in message


def test_obsolete_buffers_are_no_fault(llama: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert Model.open(_rewrite(llama, lambda t: t.update({name: torch.zeros(6)}))).blocks == 2


def test_other_shape_than_the_config(llama: Path) -> None:
    message = refusal(_configure(llama, intermediate_size=44))
    assert "[40, 48] stored, [44, 48] expected" in message or "[48, 40] stored" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(llama: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _rewrite(llama, lambda tensors: tensors[name].view(-1)[7:9].fill_(value))
    model = Model.open(llama)
    model.load(0)
    with pytest.raises(ValueError, match=rf"{name}: 2 of 1920 values"):
        model.load(1)
    with pytest.raises(ValueError, match=name):  # and a failed load leaves nothing behind
        model.load(1)


def test_embeddings_that_are_not_finite(llama: Path) -> None:
    name = "model.embed_tokens.weight"
    _rewrite(llama, lambda tensors: tensors[name][0].fill_(float("nan")))
    with pytest.raises(ValueError, match=name):
        Model.open(llama).load_outer()


def test_dtype_that_cannot_hold_the_weights(llama: Path) -> None:
    _rewrite(llama, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e6))
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        Model.open(llama, dtype=torch.float16).load(0)


def test_dtype_that_is_no_float(llama: Path) -> None:
    assert "cannot compute in torch.float64" in refusal(llama, dtype=torch.float64)


def test_encoder_decoder(llama: Path) -> None:
    changes = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    assert "no decoder-only" in refusal(_configure(llama, **changes, is_encoder_decoder=True))


def test_masked_language_model(llama: Path) -> None:
    message = refusal(_configure(llama, model_type="bert", architectures=["BertForMaskedLM"]))
    assert "BertForMaskedLM" in message


def test_more_than_a_language_model(llama: Path) -> None:
    changes = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "vision_config": {"hidden_size": 8},
    }
    assert "vision_config" in refusal(_configure(llama, **changes))


def test_family_unknown_to_transformers(llama: Path) -> None:
    message = refusal(_configure(llama, model_type="frobnicator", architectures=["FrobForX"]))
    assert "'frobnicator' is unknown" in message


def test_config_that_is_no_json(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    assert "config.json" in refusal(llama)


def test_folder_without_weights(tmp_path: Path) -> None:
    assert "no model.safetensors" in refusal(tmp_path)


def test_folder_with_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    assert str(tmp_path / "x.gguf") in refusal(tmp_path)


@pytest.mark.parametrize("source", ["./nothing", "/no/such/folder", "a/b/c"])
def test_folder_that_is_not_there(source: str) -> None:
    assert "no such folder" in refusal(source)


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    assert "no model" in refusal(tmp_path / "x.txt")
    assert "no such file" in refusal(tmp_path / "x.gguf")


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("someone/model", revision="abc")
    assert "someone/model" in message
    assert "revision abc: no connection" in message


@pytest.mark.parametrize("name", ["gemma3n", "gpt_oss"])
def test_families_that_cannot_be_walked(name: str, tmp_path: Path) -> None:
    message = refusal(tiny_model(name, tmp_path))
    assert name in message.split("\n")[0]
