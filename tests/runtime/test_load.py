"""Loading: the packed model computes what the decoded model computes, whoever loads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import aptq
from aptq.core.plan import Plan, Target
from aptq.failures import Corrupt
from aptq.kernels.cpu import Int4
from aptq.kernels.reference import Reference
from aptq.model.model import Model
from aptq.runtime.linear import PackedLinear
from aptq.runtime.load import dense, load
from tests.kernels.samples import randn
from tests.store.packed import pack
from tests.tiny import TABLE, TRACED, tiny_model, tiny_tokenizer, tiny_tokens

SHARD = "model-00001-of-00003.safetensors"


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(tiny_tokens()).logits
    return found.float()


def packed_layers(model: torch.nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("name", [*TABLE, *TRACED])
def test_packed_equals_decoded(name: str, tmp_path: Path) -> None:
    packed = pack(tiny_model(name, tmp_path), tmp_path / "out", "mixed")
    reference = load(packed.folder, kernel="reference")
    assert not reference.training
    decoded = dense(packed.folder)
    assert not packed_layers(decoded)
    wanted = logits(decoded)
    assert torch.allclose(logits(reference), wanted, atol=1e-5)
    through_transformers = AutoModelForCausalLM.from_pretrained(packed.folder)
    kept = sum(target.kept for target in packed.plan.targets.values())
    assert len(packed_layers(through_transformers)) == len(packed.plan.targets) - kept
    assert torch.allclose(logits(through_transformers), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "qwen3_moe"])
def test_the_decoded_model_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path)
    model = Model.open(source)
    keep = Plan(dict.fromkeys(model.shapes, Target()))
    decoded = dense(pack(source, tmp_path / "out", keep).folder)
    original = AutoModelForCausalLM.from_pretrained(source)
    assert type(decoded) is type(original)
    state = decoded.state_dict()
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    decoded.save_pretrained(tmp_path / "decoded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    assert torch.equal(logits(again), logits(original))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose widths suit the 4-bit kernel, int4-g32-z, bfloat16."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:  # the defaults are too near zero to tell tokens apart
                parameter.copy_(randn(*parameter.shape, seed=number) * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    return pack(folder / "source", folder / "out", "int4-g32-z").folder


def test_fast_kernels_take_over_and_stay_small(wide: Path) -> None:
    model = load(wide)
    layers = packed_layers(model)
    assert len(layers) == 14
    assert all(isinstance(layer.parts[0], Int4) for layer in layers)
    exact = logits(load(wide, kernel="reference", dtype=torch.float32))
    error = (logits(model) - exact).norm() / exact.norm()
    rounding = (logits(load(wide, kernel="reference")) - exact).norm() / exact.norm()
    assert float(error) < 2 * float(rounding) + 1e-3
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    disk = sum(path.stat().st_size for path in wide.glob("*.safetensors"))
    assert sum(held.values()) < 1.1 * disk
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("text", ["int4-g32-z", "int3-g7", "int8-row", "bf16"])
def test_no_file_stays_mapped(wide: Path, tmp_path: Path, text: str) -> None:
    folder = pack(wide.parent / "source", tmp_path / "out", text).folder
    model = load(folder)
    assert len(packed_layers(model)) == 14
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_ties_survive_loading(tmp_path: Path) -> None:
    model = load(pack(tiny_model("qwen2", tmp_path), tmp_path / "out").folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_leaves_codes_and_scales_alone(wide: Path, dtype: torch.dtype) -> None:
    model = load(wide, dtype=dtype, kernel="reference")
    assert model.dtype == dtype
    stored = {name: t for path in wide.glob("*.safetensors") for name, t in load_file(path).items()}
    parts = {name: t for name, t in model.state_dict().items() if ".parts." in name}
    assert parts
    for name, tensor in parts.items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name])


def test_greedy_tokens_are_equal(wide: Path) -> None:
    ids = tiny_tokens(batch=3, length=5)
    wanted = dense(wide, dtype=torch.float32).generate(ids, max_new_tokens=16, do_sample=False)
    packed = load(wide, dtype=torch.float32, kernel="reference")
    assert torch.equal(packed.generate(ids, max_new_tokens=16, do_sample=False), wanted)


def test_the_public_name_and_the_tokenizer(wide: Path) -> None:
    assert torch.equal(logits(aptq.load(wide)), logits(load(wide)))
    assert AutoTokenizer.from_pretrained(wide).decode([1, 2]) == tiny_tokenizer().decode([1, 2])


def test_a_packed_model_is_not_saved_from_memory(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="aptq"):
        load(wide).save_pretrained(tmp_path)


def test_reference_keeps_what_is_stored(wide: Path) -> None:
    for layer in packed_layers(load(wide, kernel="reference")):
        assert all(isinstance(kernel, Reference) for kernel in layer.parts)


@pytest.fixture
def copy(wide: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wide, tmp_path / "copy"))


def both_refuse(folder: Path, words: str) -> None:
    """Our own loader and transformers' refuse the folder in three lines."""
    loaders: list[Callable[[Path], object]] = [load, AutoModelForCausalLM.from_pretrained]
    for loader in loaders:
        with pytest.raises(Corrupt, match=words) as caught:
            loader(folder)
        assert len(str(caught.value).splitlines()) == 3


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the same entry in config.json and in aptq.json, where it is there too."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data["quantization_config"])
    path.write_text(json.dumps(data))


def test_missing_and_extra_tensors_are_refused(copy: Path) -> None:
    tensors = load_file(copy / SHARD)
    name = "model.layers.0.self_attn.q_proj.parts.0.scale"
    index = copy / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    where = listed["weight_map"]
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(fewer, copy / SHARD, metadata={"format": "pt"})
    index.write_text(
        json.dumps({**listed, "weight_map": {k: where[k] for k in where if k != name}})
    )
    both_refuse(copy, rf"(?s)missing.*{name}")
    save_file(
        {**tensors, f"{name}x": tensors[name].clone()}, copy / SHARD, metadata={"format": "pt"}
    )
    index.write_text(json.dumps({**listed, "weight_map": {**where, f"{name}x": SHARD}}))
    both_refuse(copy, rf"(?s)unknown.*{name}x")


def test_norms_are_checked_as_well(copy: Path) -> None:
    tensors = load_file(copy / SHARD)
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, copy / SHARD, metadata={"format": "pt"})
    with pytest.raises(Corrupt, match=r"(?s)missing.*input_layernorm"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_another_dtype_of_scales_is_refused(copy: Path) -> None:
    tensors = load_file(copy / SHARD)
    name = "model.layers.0.self_attn.q_proj.parts.0.scale"
    save_file({**tensors, name: tensors[name].float()}, copy / SHARD, metadata={"format": "pt"})
    both_refuse(copy, r"(?s)does not fit the plan.*float32.*float16")


def test_a_cut_shard_is_refused(copy: Path) -> None:
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[:-100])
    both_refuse(copy, rf"(?s)damaged.*{SHARD}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(version=2), r"(?s)newer aptq.*version 2.*install"),
        (lambda c: c.update(extra=1), r"(?s)unknown keys.*extra"),
        (lambda c: c.pop("plan"), r"(?s)missing keys.*plan"),
        (lambda c: c.update(kernel="os.system"), r"(?s)unknown kernel"),
        (lambda c: c["plan"].update(grids=["int4-g32-z; rm"]), r"plan of a checkpoint is broken"),
        (lambda c: c["plan"].update(grids=["int3-g32-z"]), r"(?s)does not fit the plan"),
        (lambda c: c["plan"]["targets"].update({"lm_heart": 0}), r"(?s)plan does not fit.*heart"),
    ],
)
def test_a_tampered_config_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_config(copy, change)
    with pytest.raises(Corrupt, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(copy)
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(Corrupt):
        load(copy)


def test_a_tampered_manifest_is_refused_by_our_loader(copy: Path) -> None:
    path = copy / "aptq.json"
    path.write_text(path.read_text().replace('"int4-g32-z"', '"int4-g32-fz"'))
    with pytest.raises(Corrupt, match="different plans"):
        load(copy)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}])
def test_config_and_shards_suffice(copy: Path, device_map: Any) -> None:
    wanted = logits(load(copy))
    (copy / "aptq.json").unlink()
    found = AutoModelForCausalLM.from_pretrained(copy, device_map=device_map)
    assert torch.equal(logits(found), wanted)
    with pytest.raises(ValueError, match="no checkpoint here"):
        load(copy)


def test_offloading_is_refused(copy: Path, tmp_path: Path) -> None:
    parts = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    device_map = {**parts, "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"(?s)cannot be offloaded.*device_map"):
        AutoModelForCausalLM.from_pretrained(
            copy, device_map=device_map, offload_folder=tmp_path / "offload"
        )


def test_an_ordinary_model_is_no_checkpoint(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    with pytest.raises(ValueError, match=r"(?s)no checkpoint here.*aptq compress"):
        load(source)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2"])
def test_what_reference_kernels_hold_can_be_saved(name: str, tmp_path: Path) -> None:
    folder = pack(tiny_model(name, tmp_path), tmp_path / "out", "mixed").folder
    model = load(folder, kernel="reference")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert len(packed_layers(again)) == len(packed_layers(model)) > 0
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
