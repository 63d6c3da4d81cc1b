"""GPTQ folders: what is written decodes to our weights, and readers find the grid of each layer."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import Plan, Target
from aptq.core.rounding import Scales
from aptq.export import exporters
from aptq.export.gptq import packed
from aptq.exporting import export_to
from aptq.model.model import Model
from aptq.model.quantized.gptq import GPTQ
from aptq.runtime.load import dense
from aptq.store.checkpoint import Checkpoint
from tests.kernels.samples import randn, sample
from tests.store.packed import pack
from tests.tiny import TINY, tiny_model, tiny_tokenizer, tiny_tokens

Version = Literal[1, 2]
NAMES = {1: "gptq", 2: "gptq_v2"}


def wide_model(name: str, folder: Path, **changes: Any) -> Path:
    """A model whose widths suit all bits, its biases not zero."""
    config = AutoConfig.for_model(
        name,
        **{
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": None,
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = randn(*parameter.shape, seed=number) * parameter.shape[-1] ** -0.5
            parameter.add_(noise.to(torch.bfloat16))
    model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    return folder / name


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same(checkpoint: Path, exported: Path, cache: Path) -> Model:
    """Every tensor of the imported model, in float32, is that of the decoded checkpoint."""
    stored = Checkpoint.open(checkpoint)
    model = Model.open(exported, dtype=torch.float32, cache=cache)
    for index in range(model.blocks):
        prefix = model.block_name(index)
        for name, tensor in model.load(index).state_dict().items():
            full = f"{prefix}.{name}"
            layer = full.removesuffix(".weight")
            known = layer in stored.plan.targets and layer != full
            wanted = stored.dense(layer) if known else stored.tensor(full).float()
            assert torch.equal(tensor, wanted), full
        model.unload(index)
    return model


def reference(tensors: dict[str, Tensor], bits: int, version: Version) -> Tensor:
    """The weight, code by code as the specification has it: a bit stream along each column."""

    def code(words: list[int], place: int) -> int:
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        return stream >> (place * bits) & (2**bits - 1)

    columns, rows = len(tensors["g_idx"]), tensors["scales"].shape[1]
    weight = torch.empty(rows, columns)
    for o in range(rows):
        down = tensors["qweight"][:, o].tolist()
        for i in range(columns):
            g = int(tensors["g_idx"][i])
            zero = code(tensors["qzeros"][g].tolist(), o) + (version == 1)
            weight[o, i] = tensors["scales"][g, o].float() * (code(down, i) - zero)
    return weight


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("text", ["int2-g16", "int3-g8-z", "int3-row", "int4-row-z", "int8-g4"])
def test_the_bit_order_is_the_documented_one(text: str, version: Version) -> None:
    part = sample(text, 32, 32)
    assert isinstance(part, Quantized)
    if part.grid.zero == "int" and version == 1:
        codes, (scale, zero) = part.unpacked(), part.scales()
        assert zero is not None
        part = Quantized.make(codes, Scales(scale, zero.clamp_min(1)), part.grid)
    assert torch.equal(reference(packed(part, version), part.grid.bits, version), part.dense())


def test_codes_10_and_21_of_3_bits_straddle_words() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:, 10], codes[:, 21] = 5, 3
    part = Quantized.make(codes, Scales(torch.ones(32, 1).half(), None), Grid.parse("int3-row"))
    column = packed(part, 2)["qweight"][:, 0].tolist()
    assert [word & 0xFFFFFFFF for word in column] == [1 << 30, 1 | 1 << 31, 1]


def test_zeros_of_symmetric_grids_have_their_known_words() -> None:
    part = sample("int4-g16", 32, 32)
    assert isinstance(part, Quantized)
    for version, word in ((1, 0x77777777), (2, 0x88888888 - 2**32)):
        zeros = packed(part, version)["qzeros"]
        assert zeros.shape == (2, 4)
        assert (zeros == word).all()


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    asymmetric=st.booleans(),
    group=st.sampled_from((0, 1, 7, 16, 20, 64)),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    version=st.sampled_from((1, 2)),
    seed=st.integers(0, 100),
)
def test_what_is_written_is_read(
    bits: int, asymmetric: bool, group: int, rows: int, blocks: int, version: Version, seed: int
) -> None:
    """Any codes, zeros and scales, negative ones too; also in shapes that `check` refuses."""
    columns = blocks * (group or 13)
    grid = Grid(f"int{bits}", group, "int" if asymmetric else "none")
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.levels, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = torch.randn(rows, grid.groups(columns), generator=draw).half()
    least = 1 if version == 1 else 0
    zero = torch.randint(least, grid.levels, scale.shape, generator=draw, dtype=torch.uint8)
    part = Quantized.make(codes, Scales(scale, zero if asymmetric else None), grid)
    config = {"bits": bits, "group_size": group or -1, "checkpoint_format": NAMES[version]}
    read = GPTQ.read(config, "here").weight("layer", packed(part, version), torch.float32)
    assert torch.equal(read, part.dense())


@pytest.mark.parametrize(
    ("text", "version"),
    [("int2-g16-z", 2), ("int3-g32", 1), ("int4-g32", 1), ("int4-row-z", 2), ("int8-g64", 2)],
)
def test_a_folder_comes_back(text: str, version: int, tmp_path: Path) -> None:
    grid = Grid.parse(text)
    changes = {"intermediate_size": 128}  # a multiple of every group
    source = wide_model("qwen2", tmp_path, **changes, tie_word_embeddings=True)  # with biases
    made = pack(source, tmp_path / "run", text)
    out = export_to(made.folder, tmp_path / "out", to="gptq", options={"version": version})
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    found = config_of(out)
    assert json.loads((out / "quantize_config.json").read_text()) == found
    assert (found["bits"], found["group_size"]) == (grid.bits, grid.group or -1)
    assert found["sym"] is (grid.zero == "none")
    assert found["desc_act"] is False
    assert found["checkpoint_format"] == found["format"] == NAMES[version]
    assert found["dynamic"] == {}
    stored = tensors_of(out)
    prefix = "model.layers.1.self_attn.k_proj"
    assert {name.removeprefix(f"{prefix}.") for name in stored if name.startswith(prefix)} == {
        *("qweight", "qzeros", "scales", "g_idx", "bias")
    }
    groups = grid.groups(64)
    for leaf, dtype, shape in (
        ("qweight", torch.int32, (64 * grid.bits // 32, 32)),
        ("qzeros", torch.int32, (groups, 32 * grid.bits // 32)),
        ("scales", torch.float16, (groups, 32)),
        ("g_idx", torch.int32, (64,)),
    ):
        tensor = stored[f"{prefix}.{leaf}"]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), leaf
    model = assert_same(made.folder, out, tmp_path / "cache")
    assert model.tokenizer("ab").input_ids == tiny_tokenizer()("ab").input_ids
    ours = dense(made.folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(tiny_tokens()).logits, ours(tiny_tokens()).logits)


MIXED = ("int4-g32", "int4-g32", "int4-g32", "int8-g16-z", "int4-g32", "int4-g32", "int3-row")


def mixed_plan(model: Model) -> Plan:
    """Block 0: q, k, v and gate, up alike; block 1: some kept, q unlike k and v."""
    layers = list(model.shapes)
    texts = dict(zip(layers, (*MIXED, *MIXED), strict=True))
    for name in ("q_proj", "o_proj", "gate_proj", "up_proj"):
        path = next(layer for layer in layers if layer.endswith(name) and ".1." in layer)
        texts[path] = "bf16" if name == "o_proj" else "int3-g16-z" if name == "q_proj" else "keep"
    return Plan({layer: Target.parse(text) for layer, text in texts.items()})


def rule(dynamic: dict[str, Any], name: str) -> Any:
    """As vLLM looks it up: False = not quantized, None = no rule."""
    for pattern, settings_ in dynamic.items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return False if pattern.startswith("-:") else settings_
    return None


def test_a_mixed_plan(tmp_path: Path) -> None:
    source = wide_model("llama", tmp_path)
    made = pack(source, tmp_path / "run", mixed_plan(Model.open(source)))
    out = export_to(made.folder, tmp_path / "out", to="gptq")
    config = config_of(out)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    dynamic = config["dynamic"]
    for layer, target in made.plan.targets.items():
        found, grid = rule(dynamic, layer), target.grid
        if grid is None or grid.dense:
            assert found is False, layer
        else:
            shown = found or config
            assert shown["bits"] == grid.bits, layer
            assert shown["group_size"] == (grid.group or -1)
            assert shown["sym"] is (grid.zero == "none")
    assert rule(dynamic, "model.layers.0.self_attn.qkv_proj") is None
    assert rule(dynamic, "model.layers.0.mlp.gate_up_proj") is None
    assert rule(dynamic, "model.layers.1.mlp.gate_up_proj") is False
    assert rule(dynamic, "model.layers.10.mlp.down_proj") is None
    assert not any("qkv_proj" in name for name in dynamic)
    assert_same(made.folder, out, tmp_path / "cache")


def test_fused_names_have_rules_where_all_are_alike(tmp_path: Path) -> None:
    source = wide_model("llama", tmp_path)
    model = Model.open(source)
    attention = {n: "int8-g32" if n[-6] in "qkv" else "int4-g32" for n in model.shapes}
    plan = Plan({n: Target.parse(text) for n, text in attention.items()})
    made = pack(source, tmp_path / "run", plan)
    dynamic = config_of(export_to(made.folder, tmp_path / "out", to="gptq"))["dynamic"]
    assert rule(dynamic, "model.layers.1.self_attn.qkv_proj")["bits"] == 8
    assert rule(dynamic, "model.layers.1.self_attn.o_proj") is None


@pytest.mark.parametrize("name", [n for n in TINY if n not in ("gpt_oss", "gemma3n")])
def test_every_family(name: str, tmp_path: Path) -> None:
    """Linears of transformers become int8 codes; what no engine could hold is kept."""
    source = tiny_model(name, tmp_path, torch.bfloat16)
    model = Model.open(source)
    linears = {n for n in model.shapes if n.endswith(("o_proj", "out_proj", "down_proj", ".v"))}
    plan = {n: "int8-row-z" if n in linears else "keep" for n in model.shapes}
    if name == "phi3":
        plan |= {n: "int8-row" for n in model.shapes if "qkv_proj" in n}
    plan |= {n: "keep" for n in plan if ".experts." in n or name == "gpt2"}
    odd = {n for n, (rows, columns) in model.shapes.items() if rows % 4 or columns % 4}
    targets = {n: Target.parse("keep" if n in odd else text) for n, text in plan.items()}
    made = pack(source, tmp_path / "run", Plan(targets))
    out = export_to(made.folder, tmp_path / "out", to="gptq")
    assert_same(made.folder, out, tmp_path / "cache")
    if any(".experts." in n for n in model.shapes) and "quantization_config" in (
        json.loads((out / "config.json").read_text())
    ):
        experts = next(n for n in model.shapes if ".experts." in n).partition(".experts.")[0]
        dynamic = config_of(out)["dynamic"]
        assert rule(dynamic, f"{experts}.experts") is False
        assert rule(dynamic, f"{experts}.experts.1.up_proj") is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5-g32", r"int5-g32: readers share 2, 3, 4 and 8 bits"),
        ("int4-g32-fz", r"fractional zeros"),
        ("int4-g48", r"64 columns are no multiple of 48"),
        ("int4-g32+int4-g32", r"sum of 2 parts"),
    ],
)
def test_grids_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    source = wide_model("llama", tmp_path)
    plan = Plan(dict.fromkeys(Model.open(source).shapes, Target.parse(text)))
    made = pack(source, tmp_path / "run", plan)
    with pytest.raises(ValueError, match=words):
        export_to(made.folder, tmp_path / "out", to="gptq")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("to", ["gptq", "compressed_tensors", "gguf"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4-g32+r2", "a sum of 2 parts (quantized + lowrank)"),
        ("int4-g32+o1%+r2", "a sum of 3 parts (quantized + sparse + lowrank)"),
        ("int3-g32-z~", "widths differ"),
    ],
)
def test_parts_that_no_format_holds(text: str, words: str, to: str, tmp_path: Path) -> None:
    """Found in the plan, before any work; every layer is named."""
    model = Model.open(wide_model("llama", tmp_path))
    plan = Plan(dict.fromkeys(model.shapes, Target.parse(text)))
    found = [x for x in exporters.get(to)().check(model, plan) if words in x.why]
    assert {obstacle.layer for obstacle in found} == set(model.shapes)
    assert all(obstacle.instead == "plan with one grid for each layer" for obstacle in found)


def test_widths_that_words_do_not_hold(tmp_path: Path) -> None:
    made = pack(tiny_model("llama", tmp_path), tmp_path / "run", "int3-g8")  # 48, 40 and 24 wide
    with pytest.raises(ValueError, match=r"\[48, 48\] are no multiples of 32, as 3 bits need"):
        export_to(made.folder, tmp_path / "out", to="gptq")


def test_zeros_of_0_in_version_1(tmp_path: Path) -> None:
    made = pack(wide_model("llama", tmp_path), tmp_path / "run", "int2-g16-z")
    with pytest.raises(ValueError, match=r"no zero of 0\n.*zeros are 0\n.*version=2") as caught:
        export_to(made.folder, tmp_path / "out", to="gptq", options={"version": 1})
    assert len(str(caught.value).splitlines()) == 3
    assert not list(tmp_path.glob("out*"))


def test_bfloat16_scales_go_where_float16_holds_them(tmp_path: Path) -> None:
    source = wide_model("llama", tmp_path)
    made = pack(source, tmp_path / "run", "int4-g32-z-bf16")
    out = export_to(made.folder, tmp_path / "out", to="gptq")
    assert tensors_of(out)["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    assert_same(made.folder, out, tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] *= 1e-9
    model.save_pretrained(source)
    small = pack(source, tmp_path / "small", "int4-g32-z-bf16")
    with pytest.raises(ValueError, match=r"float16 scales\nmodel.layers.1.mlp.up_proj"):
        export_to(small.folder, tmp_path / "other", to="gptq")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [1, 2])
def test_gptqmodel_reads_the_same_weights(version: int, tmp_path: Path) -> None:
    """Loaded by the package itself, in float16; runs where gptqmodel is installed."""
    gptqmodel = pytest.importorskip("gptqmodel")
    source = wide_model("llama", tmp_path)
    plan = mixed_plan(Model.open(source))
    if version == 1:  # in which gptqmodel reads no zeros of other programs
        texts = {name: str(target).removesuffix("-z") for name, target in plan.targets.items()}
        plan = Plan({name: Target.parse(text) for name, text in texts.items()})
    made = pack(source, tmp_path / "run", plan)
    out = export_to(made.folder, tmp_path / "out", to="gptq", options={"version": version})
    backend = gptqmodel.BACKEND.GPTQ_TORCH
    loaded = gptqmodel.GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16)
    stored, modules = Checkpoint.open(made.folder), dict(loaded.model.named_modules())
    for name, target in made.plan.targets.items():
        module, packs = modules[name], target.grid is not None and not target.grid.dense
        weight = module.dequantize_weight().T if packs else module.weight
        assert torch.equal(weight.float(), stored.dense(name).half().float()), name
    ours = dense(made.folder, dtype=torch.float32)
    with torch.no_grad():
        error = loaded.model(tiny_tokens()).logits.float() - ours(tiny_tokens()).logits
    assert float(error.abs().max()) < 0.05
