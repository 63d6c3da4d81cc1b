"""compressed-tensors: the package and transformers read back exactly what our checkpoint holds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from aptq.cli import app
from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import Plan, Target
from aptq.core.words import unpack_words
from aptq.export import Stored, exporters, linears
from aptq.export.compressed_tensors import packed
from aptq.exporting import export_to
from aptq.model.model import Model
from aptq.runtime.load import dense
from aptq.store.checkpoint import Checkpoint
from tests.kernels.samples import make, randn
from tests.store.packed import pack
from tests.tiny import tiny_model, tiny_tokenizer, tiny_tokens

Grids = tuple[str, ...]
Sources = Callable[[str, torch.dtype], Path]
BF16 = torch.bfloat16
MIXED = ("int3-g8", "int4-g8", "int8-row", "keep", "bf16", "int5-g4", "int4-g8-bf16")
MIXED_BF16 = ("int3-g8-bf16", "int4-g8-bf16", "int8-row-bf16", "keep", "bf16", "int5-g4-bf16")
ZEROS = ("int3-g8-z", "int4-g8", "int8-row-z", "keep")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Tiny models by family and dtype, each made once."""
    base, made = tmp_path_factory.mktemp("sources"), dict[tuple[str, torch.dtype], Path]()

    def find(name: str, dtype: torch.dtype) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tiny_model(name, base / str(dtype), dtype)
        return made[name, dtype]

    return find


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose shapes suit the kernels of vLLM."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=260,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    folder = tmp_path_factory.mktemp("wide") / "llama"
    AutoModelForCausalLM.from_config(config, dtype=BF16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def planned(source: Path, grids: Grids) -> Plan:
    """Grids in turn for the linears of transformers, 16 bits for what is none."""
    model = Model.open(source)
    targets = dict.fromkeys(model.shapes, Target())
    for number, layers in enumerate(linears(model).values()):
        targets |= dict.fromkeys(layers, Target.parse(grids[number % len(grids)]))
    return Plan(targets)


def exported(source: Path, folder: Path, grids: Grids, **options: str) -> Path:
    """The export of folder/run, which is made here too."""
    run = pack(source, folder / "run", planned(source, grids)).folder
    return export_to(run, folder / "out", to="compressed-tensors", options=options)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(tiny_tokens()).logits
    return found.float()


def read(folder: Path, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert isinstance(model, PreTrainedModel)
    logits(model)  # what is still packed is decoded at the first call
    return model


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Weights as the package decodes them, with scales in float32."""
    schema = QuantizationConfig.model_validate(config_of(folder)["quantization_config"])
    tensors, found = stored(folder), {}
    for scheme in schema.config_groups.values():
        assert isinstance(scheme, QuantizationScheme)
        for name in scheme.targets:
            own = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{name}.")}
            assert ("weight_zero_point" in own) != scheme.weights.symmetric
            own["weight_scale"] = own["weight_scale"].float()
            decoder = BaseCompressor.get_value_from_registry(scheme.format)
            found[name] = decoder.decompress(own, scheme)["weight"]
    return found


def held_against(run: Path, out: Path) -> None:
    """The package decodes just what is quantized in `run`, to the same values."""
    checkpoint, found = Checkpoint.open(run), decoded(out)
    targets = checkpoint.plan.targets
    assert found.keys() == {n for n, t in targets.items() if str(t) not in ("keep", "bf16")}
    for name, weight in found.items():
        assert torch.equal(weight, checkpoint.dense(name)), name


def refusal(source: Path, folder: Path, grids: Grids, **options: str) -> str:
    with pytest.raises(ValueError, match="cannot hold this checkpoint") as caught:
        exported(source, folder, grids, **options)
    assert not (folder / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "grids"),
    [
        ("llama", BF16, ("int4-g8-bf16",)),
        ("llama", torch.float16, ("int4-g8-z",)),
        ("llama", torch.float16, ("int4-g8-bf16",)),
        ("llama", torch.float32, ("int3-g8-z",)),
        ("llama", torch.float32, MIXED),
        ("qwen2", BF16, MIXED_BF16),  # biases, a tied head
        ("phi3", torch.float32, MIXED),  # fused linears
        ("phi3", torch.float32, ("int4-g8-z",)),
        ("gpt_neox", torch.float32, ("int6-row-z",)),
        ("gpt2", torch.float32, ("keep",)),  # transposed weights, which stay as they are
    ],
)
def test_transformers_has_our_weights_and_logits(
    name: str, dtype: torch.dtype, grids: Grids, source: Sources, tmp_path: Path
) -> None:
    """Bit for bit, where the model's dtype holds the scales."""
    found = read(exported(source(name, dtype), tmp_path, grids))
    wanted = dense(tmp_path / "run")
    assert found.dtype == wanted.dtype == dtype
    state = found.state_dict()
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert torch.equal(logits(found), logits(wanted))


@pytest.mark.parametrize(
    ("grids", "bound"),
    [(("int4-g8",), 2**-8 + 2**-11), (("int4-g8", "int8-row"), 2**-7 + 2**-16)],
    ids=["one kind: to float16, then to bfloat16", "two kinds: the scales to bfloat16 first"],
)
def test_float16_scales_of_a_bfloat16_model(
    grids: Grids, bound: float, source: Sources, tmp_path: Path
) -> None:
    """Half a unit in the last place of bfloat16 is 2^-8; loaded as float16, scales are exact."""
    out = exported(source("llama", BF16), tmp_path, grids)
    model, half = read(out), read(out, dtype=torch.float16)
    worst = 0.0
    for path, weight in decoded(out).items():
        ratio = model.get_submodule(path).weight.detach() / weight
        usual = weight.abs() > 2**-13  # below, float16 itself is coarser
        worst = max(worst, float((ratio - 1).abs()[usual].max()))
        assert torch.equal(half.get_submodule(path).weight, weight.half())
    assert 2**-9 < worst <= bound
    found, wanted = logits(model), logits(dense(tmp_path / "run"))
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("grids", [MIXED, ("int2-g4-z",), ("int7-row",), ("int4-row-z-bf16",)])
def test_the_package_decodes_our_values(grids: Grids, source: Sources, tmp_path: Path) -> None:
    """Exactly; scales of grids without zeros keep their sign."""
    out = exported(source("llama", BF16), tmp_path, grids)
    held_against(tmp_path / "run", out)
    scales = [t for name, t in stored(out).items() if name.endswith("weight_scale")]
    assert any((scale < 0).any() for scale in scales) == ("-z" not in grids[0])


def test_zeros_in_a_mixture_are_written_but_transformers_fails(
    source: Sources, tmp_path: Path
) -> None:
    """Why `check` refuses them: when transformers reads this, the refusal can go."""
    refused = refusal(source("llama", BF16), tmp_path, ZEROS)
    assert "transformers reads zeros only where all layers are of one kind" in refused
    assert "--set target=vllm" in refused
    out, exporter = tmp_path / "out", exporters.get("compressed_tensors")()
    exporter.write(Stored.open(tmp_path / "run"), out, lambda done, total: None)
    held_against(tmp_path / "run", out)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        read(out)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([8, 16, 0]),
    rows=st.sampled_from([1, 7, 40]),
    columns=st.sampled_from([16, 80, 96]),
    zero=st.sampled_from(["", "-z"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_words_are_those_of_the_package(
    bits: int, group: int, rows: int, columns: int, zero: str, seed: int
) -> None:
    """Codes and zeros, both ways; and the package decodes our tensors to our values."""
    size = f"g{group}" if group else "row"
    part = make(f"int{bits}-{size}{zero}", randn(rows, columns, seed=seed))
    assert isinstance(part, Quantized)
    half, tensors = 1 << (bits - 1), packed(part, BF16)
    signed = (part.unpacked().int() - half).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(tensors["weight_packed"], theirs)
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, signed.shape), signed)
    assert torch.equal(unpack_words(theirs, bits, columns), part.unpacked())
    zeros = part.scales().zero
    assert (zeros is not None) == ("weight_zero_point" in tensors) == bool(zero)
    if zeros is not None:
        moved = (zeros.int() - half).to(torch.int8)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(moved, bits, packed_dim=0))
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, symmetric=not zero, **how)
    decoder = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors["weight_scale"] = tensors["weight_scale"].float()
    found = decoder.decompress(tensors, QuantizationScheme(targets=[], weights=args))
    assert torch.equal(found["weight"], part.dense())


def test_the_config_names_every_linear_once(source: Sources, tmp_path: Path) -> None:
    out = exported(source("llama", torch.float32), tmp_path, MIXED)
    found = config_of(out)["quantization_config"]
    fixed = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }
    assert {key: found[key] for key in fixed} == fixed
    assert "dequantize" not in found  # transformers would take the first group for all
    groups, keys = list(found["config_groups"].values()), ("num_bits", "group_size", "symmetric")
    assert [tuple(group["weights"][key] for key in keys) for group in groups] == [
        (3, 8, True),
        (4, 8, True),  # scales of both dtypes
        (8, None, True),
        (5, 4, True),
    ]
    assert groups[2]["weights"]["strategy"] == "channel"
    names = [*found["ignore"], *(name for group in groups for name in group["targets"])]
    skeleton = Model.open(source("llama", torch.float32)).skeleton
    modules = skeleton.named_modules()
    assert sorted(names) == sorted(n for n, m in modules if isinstance(m, torch.nn.Linear))
    assert "lm_head" in found["ignore"]
    one = exported(source("qwen2", BF16), tmp_path / "tied", ("int4-g8",))
    found = config_of(one)
    assert found["quantization_config"]["ignore"] == ["lm_head"]
    assert found["quantization_config"]["dequantize"]
    assert found["tie_word_embeddings"]
    assert "lm_head.weight" not in stored(one)


def test_the_folder_is_complete(source: Sources, tmp_path: Path) -> None:
    """A shard a block and one for the rest; tokenizer and generation config are carried over."""
    out = exported(source("llama", BF16), tmp_path, MIXED)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 3
    assert index.keys() == stored(out).keys()
    assert len({index[name] for name in index if ".layers.1." in name}) == 1
    names = {path.name for path in out.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert AutoTokenizer.from_pretrained(out)("abc").input_ids
    assert config_of(out)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("grids", "why"),
    [
        (("int4-g8-fz",), "int4-g8-fz: the format holds int2 to int8 with whole zeros"),
        (("int4-g32",), "48 columns are no multiple of 32"),
        (("int4-g8+int2-g8",), "it is a sum of 2 parts"),
    ],
)
def test_refused_everywhere(grids: Grids, why: str, source: Sources, tmp_path: Path) -> None:
    assert why in refusal(source("llama", BF16), tmp_path, grids)


def test_types_of_gguf_are_refused(source: Sources) -> None:
    model = Model.open(source("llama", BF16))
    plan = Plan.uniform(model.shapes, Grid.parse("q6_k"))  # without zeros
    found = exporters.get("compressed_tensors")().check(model, plan)
    assert {one.layer for one in found if "holds int2 to int8" in one.why} == set(model.shapes)


def test_kept_experts_are_refused_for_transformers(source: Sources, tmp_path: Path) -> None:
    """And transformers does fail over them."""
    folder = source("qwen3_moe", BF16)
    assert "transformers reads experts" in refusal(folder, tmp_path, ("int4-g8-bf16",))
    outline, plan = Stored.open(tmp_path / "run"), planned(folder, ("int4-g8-bf16",))
    vllm = exporters.get("compressed_tensors")(target="vllm")
    assert all("experts" not in found.layer for found in vllm.check(outline.model, plan))
    vllm.write(outline, tmp_path / "out", lambda done, total: None)
    held_against(tmp_path / "run", tmp_path / "out")
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert {"model.layers.0.mlp.gate", "model.layers.0.mlp.experts.3.up_proj"} <= {*ignored}
    with pytest.raises(RuntimeError):
        read(tmp_path / "out")


@pytest.mark.parametrize(
    ("grids", "why"),
    [
        (("int3-g32",), "int3-g32: vLLM runs int4, and int8 without zeros"),
        (("int8-g32-z",), "int8-g32-z: vLLM runs int4, and int8 without zeros"),
        (("int4-g16",), "in groups of 32, 64, 128 or a row"),
        (("int4-g32", "int4-g32", "int8-g32"), "as one matrix, of int4-g32, int8-g32"),
        (("int4-g32", "keep"), "as one matrix, of int4-g32, keep"),
    ],
)
def test_vllm_refuses(grids: Grids, why: str, wide: Path, tmp_path: Path) -> None:
    assert why in refusal(wide, tmp_path, grids, target="vllm")


def test_vllm_refuses_shapes_and_takes_the_others(
    source: Sources, wide: Path, tmp_path: Path
) -> None:
    why = refusal(source("llama", BF16), tmp_path / "narrow", ("int4-row",), target="vllm")
    assert "[24, 48] is no multiple of [64, 128]" in why
    assert "keep this layer" in why
    for number, grid in enumerate(("int4-g128-z", "int4-g32", "int8-row", "int4-g64-z-bf16")):
        out = exported(wide, tmp_path / str(number), (grid,), target="vllm")
        held_against(tmp_path / str(number) / "run", out)


def test_without_the_package(
    source: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ValueError, match=r"pip install 'aptq\[compressed-tensors\]'") as caught:
        exported(source("llama", BF16), tmp_path, MIXED)
    assert len(str(caught.value).splitlines()) == 3


def test_the_command(source: Sources, tmp_path: Path) -> None:
    run = pack(
        source("llama", BF16), tmp_path / "run", planned(source("llama", BF16), ZEROS)
    ).folder
    words = ["export", str(run), "--to", "compressed-tensors", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert "choose grids without zeros" in done.output
    assert not (tmp_path / "out").exists()
    run = pack(source("llama", BF16), tmp_path / "plain", "int4-g8-z").folder
    done = CliRunner().invoke(app, [*words[:1], str(run), *words[2:], "--json"])
    assert done.exit_code == 0, done.output
    held_against(run, tmp_path / "out")
