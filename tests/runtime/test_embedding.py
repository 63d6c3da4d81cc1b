"""Packed embeddings: rows as stored, the module's own scale, one copy for a tied head."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from aptq.core.plan import Plan, Target
from aptq.failures import Corrupt
from aptq.kernels.cpu import Int4, Int8
from aptq.kernels.reference import Reference, Tiled
from aptq.methods.quantize.rtn import RTN
from aptq.model.model import Model
from aptq.model.outer import SCALED, embedding_scale
from aptq.model.skeleton import build_skeleton
from aptq.runtime.embedding import PackedEmbedding, TiedHead, kernel_rows
from aptq.runtime.linear import PackedLinear
from aptq.runtime.load import dense, load
from aptq.runtime.skeleton import pack_skeleton
from tests.engine.outer import compressed, outer_plan
from tests.kernels.samples import randn, sample
from tests.tiny import TINY, tiny_model, tiny_tokenizer, tiny_tokens


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(tiny_tokens()).logits
    return found


@pytest.mark.parametrize(
    "grid",
    [
        *("int4-g7-z", "int3-g5-z", "int5-row-z", "int7-g4-z", "int2-g10-z", "int8-g7-z"),
        *("int3-g7-fz", "int4-row", "int6-g8", "bf16"),
    ],
)
@pytest.mark.parametrize("rows", [1, 37, 260])
def test_rows_are_those_of_the_dense_weight(grid: str, rows: int) -> None:
    part = sample(grid, rows, 21)
    generator = torch.Generator().manual_seed(rows)
    ids = torch.cat([torch.tensor([rows - 1, 0]), torch.randint(rows, (50,), generator=generator)])
    for kernel in (Reference(part), Tiled.prepare(part, torch.float32)):
        assert torch.equal(kernel_rows(kernel, ids), part.dense()[ids])
        assert kernel_rows(kernel, ids[:0]).shape == (0, 21)


@pytest.mark.parametrize("out", [16, 32, 64, 112, 240, 256])
@pytest.mark.parametrize("grid", ["int4-g32-z", "int4-g64-fz", "int4-row", "int8-g32", "int8-row"])
def test_kernels_that_rearrange_storage_give_their_rows_back(grid: str, out: int) -> None:
    part = sample(grid, out, 128)
    kernel = (Int4 if "int4" in grid else Int8).prepare(part, torch.bfloat16)
    found = kernel_rows(kernel, torch.arange(out))
    generator = torch.Generator().manual_seed(out)
    ids = torch.randint(out, (99,), generator=generator)
    assert torch.equal(kernel_rows(kernel, ids), found[ids])
    # the weight that the kernel multiplies with, and the stored one
    product = torch.cat([kernel(row[None]) for row in torch.eye(128).bfloat16()])
    assert torch.equal(found.bfloat16(), product.T)
    error = (found - part.dense()).norm() / part.dense().norm()
    assert float(error) < (4e-3 if "int4" in grid else 1e-6)


def test_values_have_shape_and_dtype_of_the_model() -> None:
    parts = [sample("int3-g7-z", 50, 21), sample("int2-row", 50, 21)]
    layer = PackedEmbedding(parts, torch.bfloat16, 3.3)
    ids = tiny_tokens(3, 5) % 50
    weight = parts[0].dense() + parts[1].dense()
    scale = torch.tensor(3.3)
    assert torch.equal(layer(ids), weight.bfloat16()[ids] * scale.bfloat16())
    assert torch.equal(layer.to(torch.float32)(ids), weight[ids] * scale)
    assert torch.equal(layer.dense(), weight)
    assert layer(ids[:0]).shape == (0, 5, 21)
    names = {f"parts.{n}.{key}" for n, key in ((0, "codes"), (0, "scale"), (0, "zero"))}
    assert layer.state_dict().keys() == {*names, "parts.1.codes", "parts.1.scale"}
    assert layer.state_dict()["parts.0.scale"].dtype == torch.float16


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_scale_of_the_module_survives_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = tiny_model(name, tmp_path, torch.bfloat16)
    run = compressed(source, tmp_path / "out", [RTN()], "int4-g16-z")
    decoded, packed = dense(run.folder, dtype=dtype), load(run.folder, dtype=dtype)
    ids = tiny_tokens()
    found = packed.get_input_embeddings()
    assert isinstance(found, PackedEmbedding)
    assert torch.equal(found(ids), decoded.get_input_embeddings()(ids))
    assert (found.scale != 1.0) == (name != "llama")


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma3"])
def test_a_tied_pair_is_held_once(name: str, kernel: str, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path, torch.bfloat16)
    run = compressed(source, tmp_path / "out", [RTN()], "int4-g16-z")
    model = load(run.folder, kernel=kernel)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, TiedHead)
    assert head.parts is embedding.parts
    assert not list(head.parameters()) + list(head.buffers())
    kind = Tiled if kernel == "auto" else Reference
    assert [type(part) for part in embedding.parts] == [kind]
    held = {t.data_ptr(): t.nbytes for t in embedding.buffers()}
    assert sum(held.values()) == run.outer.records[0]["after"]
    whole = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    disk = sum(path.stat().st_size for path in run.folder.glob("*.safetensors"))
    assert whole < 1.1 * disk
    # copies and moves keep them together
    other = copy.deepcopy(model).to(torch.float32)
    assert other.get_output_embeddings().parts is other.get_input_embeddings().parts
    wanted = logits(dense(run.folder, dtype=torch.float32))
    assert torch.allclose(logits(other), wanted, atol=0.3)
    assert logits(other).dtype == torch.float32


def test_an_untied_head_gets_the_fast_kernels(tmp_path: Path) -> None:
    run = compressed(
        tiny_model("llama", tmp_path), tmp_path / "out", [RTN()], "int3-g7", "int8-row"
    )
    model = load(run.folder)
    assert isinstance(model.lm_head, PackedLinear)
    assert type(model.get_input_embeddings().parts[0]) is Reference
    tokens = model.generate(tiny_tokens(2, 5), max_new_tokens=8, do_sample=False)
    assert torch.equal(
        tokens, dense(run.folder).generate(tiny_tokens(2, 5), max_new_tokens=8, do_sample=False)
    )


def wide_tied(folder: Path) -> Path:
    """A tied llama in bfloat16 whose widths suit the 4-bit kernel."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model("llama", vocab_size=272, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                parameter.copy_(randn(*parameter.shape, seed=number) * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_fast_kernel_of_a_tied_head_serves_the_embedding_too(tmp_path: Path) -> None:
    run = compressed(wide_tied(tmp_path / "source"), tmp_path / "out", [RTN()], "int4-g32-z")
    model = load(run.folder)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.parts[0], Int4)
    assert embedding.parts is model.lm_head.parts
    assert sum(t.nbytes for t in embedding.buffers()) <= 1.12 * run.outer.records[0]["after"]
    ids = torch.arange(272)
    exact = dense(run.folder).get_input_embeddings()(ids).float()
    assert float((embedding(ids).float() - exact).norm() / exact.norm()) < 4e-3
    wanted = logits(load(run.folder, kernel="reference", dtype=torch.float32))
    assert float((logits(model) - wanted).norm() / wanted.norm()) < 0.03
    tokens = model.generate(tiny_tokens(2, 5), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 9)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_no_file_stays_mapped(name: str, tmp_path: Path) -> None:
    run = compressed(tiny_model(name, tmp_path), tmp_path / "out", [RTN()], "int4-g16-z")
    model = load(run.folder)
    assert model.get_input_embeddings() is not None
    assert str(run.folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen2"])
def test_the_decoded_model_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    run = compressed(tiny_model(name, tmp_path), tmp_path / "out", [RTN()], "int5-g16-z")
    decoded = dense(run.folder)
    decoded.save_pretrained(tmp_path / "decoded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
    assert torch.equal(logits(again), logits(decoded))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert decoded.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_config_and_shards_suffice(device_map: str, tmp_path: Path) -> None:
    run = compressed(tiny_model("gemma3", tmp_path), tmp_path / "out", [RTN()], "int4-g16-z")
    wanted = logits(load(run.folder))
    copied = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    (copied / "aptq.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(copied, device_map=device_map)
    assert torch.equal(logits(model), wanted)


class Odd(nn.Embedding):
    """Might compute anything."""


def test_embeddings_of_unknown_kind_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embedding_scale(nn.Embedding(3, 2)) == 1.0
    assert embedding_scale(Odd(3, 2)) is None
    assert embedding_scale(nn.Embedding(3, 2, max_norm=1.0)) is None
    model = Model.open(tiny_model("llama", tmp_path))
    plan = outer_plan(model, "int4-row")
    model.check(plan)

    def odd_skeleton(config: PreTrainedConfig, dtype: torch.dtype, where: Path) -> PreTrainedModel:
        skeleton = build_skeleton(config, dtype, where)
        skeleton.get_input_embeddings().__class__ = Odd
        return skeleton

    monkeypatch.setattr("aptq.model.model.build_skeleton", odd_skeleton)
    other = Model.open(tmp_path / "llama")
    assert list(other.outer_shapes) == ["lm_head"]
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a Odd") as caught:
        other.check(plan)
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(Corrupt, match=r"model\.embed_tokens: Odd"):
        pack_skeleton(other.skeleton, other.config, plan)


def test_known_scaled_embeddings_compute_what_is_assumed() -> None:
    import transformers

    for name in sorted(SCALED):
        stem = name.removesuffix("TextScaledWordEmbedding").removesuffix("ScaledWordEmbedding")
        path = f"transformers.models.{stem.lower()}.modeling_{stem.lower()}"
        try:
            kind = getattr(__import__(path, fromlist=[name]), name)
        except ImportError:
            assert transformers.__version__ < "5.23", path
            continue
        module = kind(5, 4, 0, 2.7).to(torch.bfloat16)
        assert embedding_scale(module) == 2.7
        module.weight.data.copy_(randn(5, 4))
        packed = PackedEmbedding([sample("bf16", 5, 4)], torch.bfloat16, 2.7)
        packed.parts[0].weight = module.weight.data
        assert torch.equal(packed(torch.arange(5)), module(torch.arange(5))), name


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "transformer.wpe"), ("qwen2", "lm_head"), ("llama", "model.norm")]
)
def test_plans_of_what_is_no_layer_are_refused(family: str, name: str) -> None:
    config = TINY[family]()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Corrupt, match=rf"(?s)plan does not fit.*{name}"):
        pack_skeleton(skeleton, config, Plan({name: Target.parse("int4-row")}))
