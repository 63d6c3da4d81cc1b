"""GPTQ and compressed-tensors folders as sources: decoded once, checked, and then ordinary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import Quantized, nearest_part
from aptq.core.rounding import fit
from aptq.core.words import pack_words
from aptq.model import quantized
from aptq.model.model import Model
from aptq.model.quantized.compressed_tensors import CompressedTensors
from aptq.model.quantized.gptq import GPTQ
from tests.tiny import tiny_model, tiny_tokens

GRID = Grid.parse("int8-g8-z")
PATH = "model.layers.0.mlp.down_proj"


def part_of(weight: Tensor, grid: Grid = GRID) -> Quantized:
    part = nearest_part(weight.float(), grid)
    assert isinstance(part, Quantized)
    return part


def as_gptq(weight: Tensor, order: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of version 2 and the weight in them; column i is the order[i]-th in its groups."""
    columns = weight.shape[1]
    order = torch.arange(columns) if order is None else order
    part = part_of(weight[:, order.argsort()])
    scale, zero = part.scales()
    assert zero is not None
    codes = part.unpacked()[:, order]
    tensors = {
        "qweight": pack_words(codes, 8).T.contiguous(),
        "qzeros": pack_words(zero.T.contiguous(), 8),
        "scales": scale.T.contiguous(),
        "g_idx": (order // GRID.group).int(),
    }
    return tensors, part.dense()[:, order]


def as_compressed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    part = part_of(weight)
    scale, zero = part.scales()
    assert zero is not None
    tensors = {
        "weight_packed": pack_words(part.unpacked(), 8),
        "weight_scale": scale,
        "weight_shape": torch.tensor(part.shape),
        "weight_zero_point": pack_words(zero.T.contiguous(), 8).T.contiguous(),
    }
    return tensors, part.dense()


GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 8,
    "group_size": 8,
    "sym": False,
    "desc_act": True,
    "checkpoint_format": "gptq_v2",
}
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False}
COMPRESSED_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head"],
}
CONFIGS = {"gptq": GPTQ_CONFIG, "compressed-tensors": COMPRESSED_CONFIG}


def quantize(
    folder: Path, method: str, make: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """Quantize the linears of the blocks in place; all weights as they shall be read."""
    file = folder / "model.safetensors"
    tensors, wanted = {}, {}
    for name, tensor in load_file(file).items():
        if tensor.dim() == 2 and ".layers." in name:
            packed, wanted[name] = make(tensor)
            prefix = name.removesuffix(".weight")
            tensors |= {f"{prefix}.{leaf}": t.contiguous() for leaf, t in packed.items()}
        else:
            tensors[name] = wanted[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(folder, lambda config: config.update(quantization_config=CONFIGS[method]))
    return wanted


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_a_folder_is_decoded_once(
    method: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "SHARD", 10_000)
    wanted = quantize(llama, method, as_gptq if method == "gptq" else as_compressed)
    cache = tmp_path / "cache"
    model = Model.open(llama, cache=cache)
    assert model.source == str(llama)
    assert model.dtype == torch.float32
    found = stored(model.folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert len(list(model.folder.glob("*.safetensors"))) > 3
    assert "quantization_config" not in json.loads((model.folder / "config.json").read_text())
    assert model.tokenizer("ab").input_ids
    model.load(0)

    with monkeypatch.context() as patch:
        patch.setattr(quantized, "_convert", lambda *_: pytest.fail("decoded again"))
        assert Model.open(llama, cache=cache).folder == model.folder
        assert [path.name for path in (cache / "quantized").iterdir()] == [model.folder.name]
    half = Model.open(llama, dtype=torch.bfloat16, cache=cache)
    assert half.folder != model.folder
    down = half.load(0).get_submodule("mlp.down_proj").weight
    assert torch.equal(down, wanted[f"{PATH}.weight"].to(torch.bfloat16))


def test_act_order(llama: Path, tmp_path: Path) -> None:
    """Groups of columns in the order of a permutation, as GPTQ leaves them on disk."""

    def shuffled(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        draw = torch.Generator().manual_seed(weight.shape[1])
        tensors, wanted = as_gptq(weight, torch.randperm(weight.shape[1], generator=draw))
        index = tensors["g_idx"].long()
        codes = tensors["qweight"].T.contiguous().view(torch.uint8).float()
        zeros = tensors["qzeros"].view(torch.uint8).T.float()
        by_hand = tensors["scales"].T.float()[:, index] * (codes - zeros[:, index])
        assert torch.equal(by_hand, wanted)
        return tensors, wanted

    wanted = quantize(llama, "gptq", shuffled)
    model = Model.open(llama, cache=tmp_path / "cache")
    found = stored(model.folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_plain_order_needs_no_index(llama: Path, tmp_path: Path) -> None:
    def plain(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, wanted = as_gptq(weight)
        del tensors["g_idx"]
        return tensors, wanted

    wanted = quantize(llama, "gptq", plain)
    found = stored(Model.open(llama, cache=tmp_path / "cache").folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_transposed_linears_of_gpt2(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path)
    path = "transformer.h.0.attn.c_proj"  # square: nothing but the name says which way it lies
    with torch.no_grad():
        tensors = load_file(folder / "model.safetensors")
        packed, wanted = as_gptq(tensors.pop(f"{path}.weight").T.contiguous())
        tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, lambda config: config.update(quantization_config=GPTQ_CONFIG))
    model = Model.open(folder, cache=tmp_path / "cache")
    assert torch.equal(model.load(0).get_submodule("attn.c_proj").weight, wanted)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    asymmetric=st.booleans(),
    group=st.sampled_from((0, 5, 16)),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    scale=st.sampled_from(("fp16", "bf16")),
)
def test_the_package_packs_what_we_read(
    bits: int, asymmetric: bool, group: int, rows: int, blocks: int, scale: Any
) -> None:
    """Tensors by the compressor of compressed-tensors itself, odd shapes included."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    grid = Grid(f"int{bits}", group, "int" if asymmetric else "none", scale)
    columns = blocks * (group or 11)
    draw = torch.Generator().manual_seed(rows)
    scales = fit(torch.randn(rows, columns, generator=draw), grid)
    codes = torch.randint(0, grid.levels, (rows, columns), generator=draw, dtype=torch.uint8)
    part = Quantized.make(codes, scales, grid)
    half = 2 ** (bits - 1)
    tensors = {
        "weight_packed": helpers.pack_to_int32((codes.int() - half).to(torch.int8), bits),
        "weight_scale": scales.scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if scales.zero is not None:
        zero = (scales.zero.int() - half).to(torch.int8)
        tensors["weight_zero_point"] = helpers.pack_to_int32(zero, bits, packed_dim=0)
    args = {"num_bits": bits, "type": "int", "symmetric": not asymmetric}
    args |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    config = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": args}}}
    read = CompressedTensors.read(config, "here").weight("layer", tensors, torch.float32)
    assert torch.equal(read, part.dense())


def test_a_named_scheme_goes_first() -> None:
    """12 columns take two words in 3 and in 4 bits: only the name tells them apart."""
    four, three = Grid.parse("int4-row"), Grid.parse("int3-row")
    part = part_of(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), three)
    groups = {
        str(grid): {
            "targets": [target],
            "weights": {"num_bits": grid.bits, "type": "int", "strategy": "channel"},
        }
        for grid, target in ((four, "re:.*"), (three, "a.b"))
    }
    tensors = {
        "weight_packed": pack_words(part.unpacked(), 3),
        "weight_scale": part.scale,
        "weight_shape": torch.tensor(part.shape),
    }
    config = {"format": "pack-quantized", "config_groups": groups}
    read = CompressedTensors.read(config, "here")
    assert torch.equal(read.weight("a.b", tensors, torch.float32), part.dense())


def refused(folder: Path, cache: Path) -> str:
    with pytest.raises(ValueError, match="\n") as caught:
        Model.open(folder, cache=cache)
    assert len(str(caught.value).splitlines()) == 3
    made = cache / "quantized"
    assert not made.exists() or not list(made.iterdir())
    return str(caught.value)


GPTQ_CONFIGS = [
    ({"bits": 5}, "bits 5"),
    ({"bits": "4"}, "bits '4'"),
    ({"bits": None}, "bits None"),
    ({"group_size": 0}, "group_size 0"),
    ({"group_size": "all"}, "group_size 'all'"),
    ({"dynamic": {".*": {"bits": 7}}}, "bits 7"),
    ({"checkpoint_format": "marlin"}, "this form of GPTQ is not read"),
    ({"dynamic": [1]}, "quantization_config is broken"),
    ({"dynamic": {".*": [1]}}, "quantization_config is broken"),
    ({"pack_dtype": "int16"}, "gptq_v2 in int16"),
    ({"bits": 4}, "not of 4 bits in groups of 8"),
    ({"group_size": 16}, "not of 8 bits in groups of 16"),
]


@pytest.mark.parametrize(("change", "words"), GPTQ_CONFIGS)
def test_gptq_configs_that_are_refused(
    change: dict[str, Any], words: str, llama: Path, tmp_path: Path
) -> None:
    quantize(llama, "gptq", as_gptq)
    change_config(llama, lambda config: config["quantization_config"].update(change))
    assert words in refused(llama, tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{PATH}.qzeros"), rf"missing\n.*{PATH}.qzeros"),
        (lambda t: t.update({f"{PATH}.qzeros": t[f"{PATH}.qzeros"].long()}), r"qzeros int64"),
        (lambda t: t.update({f"{PATH}.scales": t[f"{PATH}.scales"].int()}), r"scales int32"),
        (lambda t: t.update({f"{PATH}.scales": t[f"{PATH}.scales"][:-1].clone()}), r"\[4, 48\]"),
        (lambda t: t.update({f"{PATH}.qweight": torch.tensor(1).int()}), r"qweight int32 \[\]"),
        (lambda t: t.update({f"{PATH}.g_idx": t[f"{PATH}.g_idx"][None]}), r"g_idx int32 \[1, 40\]"),
        (lambda t: t[f"{PATH}.g_idx"].fill_(5), r"(?s)groups that do not exist.*to 5 of 5"),
        (lambda t: t[f"{PATH}.g_idx"].fill_(-1), r"(?s)groups that do not exist.*from -1"),
    ],
)
def test_gptq_tensors_that_are_refused(
    change: Callable[[dict[str, Tensor]], object], words: str, llama: Path, tmp_path: Path
) -> None:
    quantize(llama, "gptq", as_gptq)
    change_tensors(llama, change)
    with pytest.raises(ValueError, match=words):
        Model.open(llama, cache=tmp_path / "cache")
    refused(llama, tmp_path / "cache")


def test_zeros_that_overflow_in_version_1() -> None:
    read = GPTQ.read({"bits": 8, "group_size": 8}, "here")
    tensors, _ = as_gptq(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    tensors["qzeros"] = tensors["qzeros"].view(torch.uint8).fill_(255).view(torch.int32)
    with pytest.raises(ValueError, match=r"zeros overflow in version 1.*\n.*16 of 16 zeros"):
        read.weight("layer", tensors, torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "float-quantized"}, "float-quantized"),
        ({"config_groups": {"a": 1}}, "quantization_config is broken"),
        ({"transform_config": {"a": 1}}, "transform_config"),
        ({"config_groups": {"a": {"weights": {**WEIGHTS, "num_bits": 1}}}}, "1 bits"),
        ({"config_groups": {"a": {"weights": {**WEIGHTS, "type": "float"}}}}, "float of 8"),
        ({"config_groups": {"a": {"weights": {**WEIGHTS, "strategy": "block"}}}}, "by block"),
        ({"config_groups": {"a": {"weights": {**WEIGHTS, "group_size": 0}}}}, "of 0"),
        ({"config_groups": {"a": {"weights": {**WEIGHTS, "symmetric": True}}}}, "not of 8 bits"),
        ({"config_groups": {"a": {"weights": {**WEIGHTS, "num_bits": 7}}}}, "not of 7 bits"),
        ({"config_groups": {}}, "not of any config group"),
    ],
)
def test_compressed_configs_that_are_refused(
    change: dict[str, Any], words: str, llama: Path, tmp_path: Path
) -> None:
    quantize(llama, "compressed-tensors", as_compressed)
    change_config(llama, lambda config: config["quantization_config"].update(change))
    assert words in refused(llama, tmp_path / "cache")


@pytest.mark.parametrize("shape", [[48], [48, -40], [1 << 60, 40], [0, 0], [40, 48]])
def test_compressed_shapes_that_are_refused(shape: list[int], llama: Path, tmp_path: Path) -> None:
    quantize(llama, "compressed-tensors", as_compressed)
    change_tensors(llama, lambda t: t.update({f"{PATH}.weight_shape": torch.tensor(shape)}))
    assert "not of 8 bits" in refused(llama, tmp_path / "cache")


def test_other_methods_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    change_config(llama, lambda found: found.update(config))
    assert "already quantized (awq)" in refused(llama, tmp_path / "cache")


def test_an_outline_without_weights(llama: Path) -> None:
    shapes = Model.open(llama).shapes
    change_config(llama, lambda config: config.update(quantization_config=GPTQ_CONFIG))
    (llama / "model.safetensors").unlink()
    assert Model.outline(llama).shapes == shapes


def test_a_quantized_source_runs(llama: Path, tmp_path: Path) -> None:
    """What is evaluated is the decoded model."""
    from aptq.runtime.open import original

    wanted = quantize(llama, "gptq", as_gptq)
    plain = tiny_model("llama", tmp_path / "plain")
    save_file(wanted, plain / "model.safetensors", metadata={"format": "pt"})
    # The cache is the user's own there, so the folder is converted beforehand.
    folder = Model.open(llama, cache=tmp_path / "cache").folder
    device = torch.device("cpu")
    with torch.no_grad():
        found = original(folder, device).model(tiny_tokens()).logits
        assert torch.equal(found, original(plain, device).model(tiny_tokens()).logits)
