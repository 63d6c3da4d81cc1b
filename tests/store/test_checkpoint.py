"""Checkpoints: what is written is read back exactly; what was tampered with is refused by name."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aptq.core.parts import Dense, Quantized
from aptq.failures import Corrupt
from aptq.methods.quantize.rtn import RTN
from aptq.model.model import Model
from aptq.store.checkpoint import Checkpoint, Writer, find
from aptq.store.headers import publish
from aptq.store.predict import predict
from tests.engine.outer import compressed, outer_plan
from tests.store.packed import Packed, block_tensors, pack
from tests.tiny import tiny_model

FIRST = "model-00001-of-00003.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    return pack(tiny_model("llama", folder, torch.bfloat16), folder / "out", "mixed")


@pytest.fixture
def copy(packed: Packed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(folder: Path, *words: str) -> None:
    """Opening raises Corrupt: three lines that hold `words`."""
    with pytest.raises(Corrupt) as caught:
        Checkpoint.open(folder)
    assert len(str(caught.value).splitlines()) == 3, str(caught.value)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_layers_come_back_exactly(packed: Packed) -> None:
    checkpoint = Checkpoint.open(packed.folder)
    checkpoint.verify()
    assert checkpoint.plan == packed.plan
    assert checkpoint.nbytes == sum(path.stat().st_size for path in packed.folder.iterdir())
    stored = block_tensors(packed.model, 0, packed.plan)
    seen = set()
    for name, target in packed.plan.targets.items():
        parts = checkpoint.layer(name)
        seen.add(str(target))
        assert len(parts) == max(1, len(target.parts))
        assert all(part.shape == packed.model.shapes[name] for part in parts)
        if name.startswith("model.layers.0."):
            for number, part in enumerate(parts):
                prefix = f"{name}." if target.kept else f"{name}.parts.{number}."
                for key, tensor in part.tensors().items():
                    assert torch.equal(tensor, stored[prefix + key])
        total = sum((part.dense() for part in parts[1:]), start=parts[0].dense())
        assert torch.equal(checkpoint.dense(name), total)
    assert len(seen) == 7
    kinds = {type(part) for name in packed.plan.targets for part in checkpoint.layer(name)}
    assert kinds == {Quantized, Dense}


def test_decoded_weights_are_near_the_source(packed: Packed) -> None:
    block = packed.model.load(0)
    weight = block.get_submodule("self_attn.q_proj").weight.float()
    packed.model.unload(0)
    found = Checkpoint.open(packed.folder).dense(LAYER)
    assert float((found - weight).norm() / weight.norm()) < 0.15


def test_the_same_input_gives_the_same_bytes(packed: Packed, tmp_path: Path) -> None:
    source = packed.folder.parent / "llama"
    again = pack(source, tmp_path / "again", "mixed")
    for path in packed.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tied = pack(tiny_model("qwen2", tmp_path, torch.bfloat16), tmp_path / "out")
    checkpoint = Checkpoint.open(tied.folder)
    assert checkpoint.manifest.tied
    assert "model.embed_tokens.weight" in checkpoint.specs
    assert "lm_head.weight" not in checkpoint.specs


def test_a_run_folder_is_accepted(packed: Packed, tmp_path: Path) -> None:
    shutil.copytree(packed.folder, tmp_path / "run" / "checkpoint")
    assert find(tmp_path / "run") == tmp_path / "run" / "checkpoint"
    with pytest.raises(ValueError, match=r"(?s)no checkpoint here.*aptq\.json.*run folder"):
        Checkpoint.open(tmp_path)


def test_an_unfinished_checkpoint_is_none(packed: Packed, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", packed.model, packed.plan)
    writer.write_block(0, block_tensors(packed.model, 0, packed.plan))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FIRST]
    with pytest.raises(ValueError, match="no checkpoint here"):
        Checkpoint.open(tmp_path / "out")
    with pytest.raises(AssertionError, match=r"never written.*00002"):
        writer.finish()


def test_wrong_tensors_are_not_written(packed: Packed, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", packed.model, packed.plan)
    tensors = block_tensors(packed.model, 0, packed.plan)
    scale = tensors.pop(f"{LAYER}.parts.0.scale")
    with pytest.raises(AssertionError, match=r"q_proj\.parts\.0\.scale"):
        writer.write_block(0, tensors)
    with pytest.raises(AssertionError, match=r"float32"):
        writer.write_block(0, {**tensors, f"{LAYER}.parts.0.scale": scale.float()})
    assert not list((tmp_path / "out").iterdir())


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"begun"
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "file", chunks())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_a_flipped_byte_is_found_by_verify(copy: Path) -> None:
    data = bytearray((copy / FIRST).read_bytes())
    data[-1] ^= 1
    (copy / FIRST).write_bytes(data)
    with pytest.raises(Corrupt, match=rf"(?s)was changed.*{FIRST}.*SHA-256.*copy or download"):
        Checkpoint.open(copy).verify()


def test_swapped_layers_are_found_by_verify(copy: Path) -> None:
    second = FIRST.replace("00001", "00002")
    one, two = load_file(copy / FIRST), load_file(copy / second)
    mine, other = f"{LAYER}.parts.0.codes", f"{LAYER}.parts.0.codes".replace("s.0.s", "s.1.s")
    one[mine], two[other] = two[other], one[mine]
    save_file(one, copy / FIRST, metadata={"format": "pt"})
    save_file(two, copy / second, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(copy)  # all shapes fit
    with pytest.raises(Corrupt, match="was changed"):
        checkpoint.verify()


@pytest.mark.parametrize("keep", [-1000, 200, 4, 0])
def test_a_cut_shard_is_refused(copy: Path, keep: int) -> None:
    data = (copy / FIRST).read_bytes()
    (copy / FIRST).write_bytes(data[:keep])
    refused(copy, "damaged, cut off or missing", FIRST, f"{len(data[:keep]):,} bytes")


@pytest.mark.parametrize("name", [FIRST, "config.json", "tokenizer.json"])
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    refused(copy, "missing", name)


def test_missing_tensors_are_refused(copy: Path) -> None:
    tensors = load_file(copy / FIRST)
    del tensors[f"{LAYER}.parts.0.scale"]
    save_file(tensors, copy / FIRST, metadata={"format": "pt"})
    refused(copy, "index and the weight files disagree", f"{LAYER}.parts.0.scale")
    index = copy / "model.safetensors.index.json"
    edit(index, lambda data: data["weight_map"].pop(f"{LAYER}.parts.0.scale"))
    refused(copy, "planned layers are missing", f"{LAYER}.parts.0.scale")


def test_another_dtype_or_shape_is_refused(copy: Path) -> None:
    tensors = load_file(copy / FIRST)
    scale = tensors[f"{LAYER}.parts.0.scale"]
    for wrong in (scale.float(), scale[:, :1].contiguous(), scale.bfloat16()):
        changed = {**tensors, f"{LAYER}.parts.0.scale": wrong}
        save_file(changed, copy / FIRST, metadata={"format": "pt"})
        refused(copy, "does not fit the plan", f"{LAYER}.parts.0.scale", "expected")


def change_bits(data: dict[str, Any]) -> None:
    data["plan"]["grids"][0] = "int5-g16-z"


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda d: d.update(version=2), "newer aptq"),
    "other format": (lambda d: d.update(format="gguf"), "not an aptq checkpoint"),
    "no version": (lambda d: d.pop("version"), "not an aptq checkpoint"),
    "true version": (lambda d: d.update(version=True), "not an aptq checkpoint"),
    "unknown key": (lambda d: d.update(extra=1), "unknown keys"),
    "missing key": (lambda d: d.pop("shapes"), "missing keys"),
    "wrong kind": (lambda d: d.update(tied=1), "wrong kind"),
    "dtype": (lambda d: d.update(dtype="os.system"), "unknown dtype"),
    "bits": (change_bits, "different plans"),
    "grid": (lambda d: d["plan"].update(grids=["int9"]), "plan of a checkpoint is broken"),
    "layer": (lambda d: d["plan"]["targets"].update(x=0), "plan and shapes"),
    "shape": (lambda d: d["shapes"].update({LAYER: [48, 1 << 40]}), "impossible shape"),
    "swapped shape": (lambda d: d["shapes"].update({LAYER: [1, 2]}), "does not fit the plan"),
    "path": (lambda d: d["files"].update({"../x": "0" * 64}), "not allowed"),
    "hidden": (lambda d: d["files"].update({".x": "0" * 64}), "not allowed"),
    "itself": (lambda d: d["files"].update({"aptq.json": "0" * 64}), "not allowed"),
    "hash": (lambda d: d["files"].update({FIRST: "0" * 63}), "no SHA-256"),
    "absent": (lambda d: d["files"].update({"absent": "0" * 64}), "missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_manifest_is_refused(copy: Path, case: str) -> None:
    change, words = BROKEN[case]
    edit(copy / "aptq.json", change)
    refused(copy, words)


def test_a_newer_version_says_which_one_is_needed(copy: Path) -> None:
    edit(copy / "aptq.json", lambda data: data.update(version=7))
    refused(copy, "version 7", "up to 1", "install an aptq that reads format version 7")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a":' * 50_000, "\xff"])
def test_what_is_no_json_is_refused(copy: Path, text: str) -> None:
    (copy / "aptq.json").write_text(text, encoding="latin-1")
    refused(copy, "aptq.json")


def test_another_config_is_refused(copy: Path) -> None:
    edit(copy / "config.json", lambda data: data.pop("quantization_config"))
    refused(copy, "config.json does not belong")


def test_random_damage_never_surprises(copy: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("aptq.json", FIRST, "model.safetensors.index.json", "config.json"):
        whole = (copy / name).read_bytes()
        for _ in range(40):
            place, value = torch.randint(0, 1 << 30, (2,), generator=generator).tolist()
            data = bytearray(whole)
            data[place % min(len(data), 4000)] = value % 256
            (copy / name).write_bytes(data)
            with contextlib.suppress(Corrupt):  # nothing else may be raised
                Checkpoint.open(copy).verify()
        (copy / name).write_bytes(whole)
    Checkpoint.open(copy).verify()


def test_outer_layers_are_in_the_manifest(tmp_path: Path) -> None:
    """The embedding's parts are stored once; a reader is told what lies outside."""
    run = compressed(tiny_model("qwen2", tmp_path), tmp_path / "out", [RTN()], "int4-g16-z")
    checkpoint = Checkpoint.open(run.folder)
    assert checkpoint.manifest.outer == ("model.embed_tokens",)
    assert checkpoint.manifest.shapes["model.embed_tokens"] == (260, 48)
    found = checkpoint.plan.bits(checkpoint.manifest.shapes, 4, checkpoint.manifest.outer)
    assert found == predict(run.model, run.plan).bits
    for wrong in ({"outer": ["lm_head"]}, {"outer": [3]}, {"outer": ["model.embed_tokens"] * 2}):
        edit(run.folder / "aptq.json", lambda data, wrong=wrong: data.update(wrong))
        refused(run.folder, "outside the blocks", str(next(iter(wrong["outer"]))))
    edit(run.folder / "aptq.json", lambda data: data.update(outer={}))
    refused(run.folder, "outer is a dict")


def test_outer_layers_that_are_none_are_refused(tmp_path: Path) -> None:
    tied = Model.open(tiny_model("qwen2", tmp_path))
    assert tied.outer_shapes == {"model.embed_tokens": (260, 48)}
    with pytest.raises(ValueError, match=r"(?s)'lm_head'.*tied.*plan one of.*model\.embed_tokens"):
        predict(tied, outer_plan(tied, None, "int4-row"))
    untied = Model.open(tiny_model("llama", tmp_path))
    assert list(untied.outer_shapes) == ["model.embed_tokens", "lm_head"]
    plan = outer_plan(untied, None, "int4-row")
    assert predict(untied, plan).total < predict(untied, outer_plan(untied, None)).total
    plan.targets["lm_heart"] = plan.targets["lm_head"]
    with pytest.raises(ValueError, match=r"(?s)'lm_heart'.*the model lacks.*did you mean lm_head"):
        Writer(tmp_path / "out", untied, plan)
    gpt = Model.open(tiny_model("gpt2", tmp_path))
    assert gpt.outer_shapes == {"transformer.wte": (260, 48)}
