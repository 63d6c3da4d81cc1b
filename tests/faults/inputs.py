"""Cases 1 to 5, 10 to 13, 19 and 28: what lies on the disk is not what it should be."""

import gzip
import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.faults.bench import GPTQ, RTN, Box, case, configure, edit, peak, weights

FLAT = 64 << 20  # bytes of memory that a refusal may take


@case(1, "a shard is missing", "code 2, the file and its tensors named")
def missing_shard(box: Box) -> None:
    folder = box.model(sharded=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    seen = box.compress(folder).be(2, "a shard of the model is missing", shard.name, "layers.")
    assert seen.seconds < 10, seen.seconds


@case(2, "a shard is cut off", "code 2, expected and actual bytes")
def cut_shard(box: Box) -> None:
    for keep in (-1000, 100):
        folder = box.model()
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:keep])
        words = [f"{len(data):,} expected"] if keep < 0 else []
        box.compress(folder).be(2, "damaged or cut off", f"{len(data[:keep]):,} bytes", *words)


def _header(text: bytes, data: bytes = b"\0" * 64) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def _entry(name: str, begin: int, end: int, dtype: str = "F32") -> str:
    shape = [(end - begin) // 4]
    return f'"{name}":' + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


HOSTILE = {
    "length 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "length 200 MB": (200 << 20).to_bytes(8, "little") + b"{}",
    "no JSON": _header(b"x" * 64),
    "same key twice": _header(("{" + ",".join([_entry("a", 0, 64)] * 2) + "}").encode()),
    "overlap": _header(("{" + _entry("a", 0, 64) + "," + _entry("b", 32, 64) + "}").encode()),
    "unknown dtype": _header(("{" + _entry("a", 0, 64, "Q9") + "}").encode()),
    "name ../x": _header(("{" + _entry("../x", 0, 64) + "}").encode()),
    "deep nesting": _header(b"[" * 100_000 + b"]" * 100_000),
}


@case(3, "hostile headers", "code 2 (own files 6), under 1 s, memory flat")
def hostile_header(box: Box) -> None:
    folder, run = box.model(), box.packed()
    box.compress(folder).be(0)  # everything is imported from here on
    shard = next((run / "checkpoint").glob("model-*.safetensors"))
    before = peak()
    for data in HOSTILE.values():
        (folder / "model.safetensors").write_bytes(data)
        for seen in (box.compress(folder).be(2), _rewritten(box, run, shard, data)):
            assert seen.seconds < 1, (seen.seconds, seen.short())
    assert peak() - before < FLAT, peak() - before


def _rewritten(box: Box, run: Path, shard: Path, data: bytes):  # type: ignore[no-untyped-def]
    shard.write_bytes(data)
    return box.run("verify", run).be(6)


@case(4, "index and shards disagree", "code 2, first five named and the count")
def wrong_index(box: Box) -> None:
    folder = box.model(sharded=True)
    index = folder / "model.safetensors.index.json"
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))

    def swap(data: dict) -> None:  # type: ignore[type-arg]
        where = data["weight_map"]
        name = next(name for name, shard in where.items() if shard == shards[0])
        where[name] = shards[1]

    edit(index, swap)
    box.compress(folder).be(2, "disagree", "tensors missing")
    folder = box.model(sharded=True)
    edit(folder / index.name, lambda data: data["weight_map"].update(extra=shards[0]))
    box.compress(folder).be(2, "disagree", "extra")
    folder = configure(box.model(), intermediate_size=44)
    box.compress(folder).be(2, "another shape than config.json", "stored", "6 tensors")


@case(5, "NaN and Inf in weights", "code 2 in preflight, tensor and count; or kept by a flag")
def not_finite(box: Box) -> None:
    folder = box.model()
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first][0, 0] = torch.nan
        tensors[second][1, 2:5] = torch.inf

    weights(folder, damage)
    box.compress(folder, how=GPTQ).be(2, first, second, "1 of 1,920", "3 of 2,304")
    out = box.out()
    box.run("compress", folder, "--out", out, *RTN, "--allow-nonfinite", "keep").be(0)
    plan = json.loads((out / "plan.json").read_text())
    names = (first.removesuffix(".weight"), second.removesuffix(".weight"))
    assert all(plan["grids"][plan["targets"][name]] == "keep" for name in names), plan
    box.run("verify", out).be(0)


@case(10, "calibration file that is no text", "code 2 before the model, the problem named")
def data_no_text(box: Box) -> None:
    folder = box.model()
    files = {
        "empty": (b"", "is empty"),
        "random": (os.urandom(4096), "binary data or another encoding"),
        "packed": (gzip.compress(b"text " * 99), "gzip data"),
        "utf16": ("text ".encode("utf-16") * 99, "UTF-16"),
        "nulls": (b"text\0" * 99, "zero byte"),
    }
    for name, (data, word) in files.items():
        (box.root / name).write_bytes(data)
        seen = box.compress(folder, "--data", box.root / name, how=GPTQ)
        if name == "random":
            seen.be(2, "is not UTF-8 text")
        else:
            seen.be(2, word)
    box.compress(folder, "--data", box.root / "nowhere.txt", how=GPTQ).be(2, "does not exist")


@case(11, "calibration text too short, or under another key", "code 2, found and needed; keys")
def data_too_short(box: Box) -> None:
    folder = box.model()
    short, keyed = box.root / "short.txt", box.root / "keyed.jsonl"
    short.write_text("abcde\n" * 3)
    box.compress(folder, "--data", short, how=GPTQ).be(2, "18 tokens found, 128 needed")
    keyed.write_text(json.dumps({"content": "text", "id": 1}) + "\n")
    box.compress(folder, "--data", keyed, how=GPTQ).be(2, "keys present: content, id")
    rows = box.root / "rows.jsonl"  # short documents are joined
    rows.write_text("".join(json.dumps({"text": "abcde"}) + "\n" for _ in range(60)))
    box.compress(folder, "--data", rows, how=GPTQ).be(0)


@case(12, "tokenizer of another model", "code 2 before a forward pass: id, rows, class")
def foreign_tokenizer(box: Box) -> None:
    def put(folder: Path, first: int) -> Path:
        vocabulary = {chr(0x21 + i): first + i for i in range(90)} | {"<unk>": 0}
        vocabulary |= {f"filler{i}": i for i in range(1, first)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        return folder

    seen = box.compress(put(box.model(), 300), how=GPTQ)
    seen.be(2, "another model", "rows 260", "389")
    assert "Tokenizer" in seen.text or "TokenizersBackend" in seen.text, seen.short()
    box.compress(put(box.model(), 100), how=GPTQ).be(0)  # without a padding token


@case(13, "windows longer than the model's positions", "code 2 with the model's limit")
def too_long(box: Box) -> None:
    words = ("--recipe", "gptq", "--grid", "int4-g16-z", "--samples", "1", "--length", "1000000")
    box.compress(box.model(), how=words).be(2, "length 1000000, positions of the model 128")


@case(19, "the source is quantized already", "known kinds decoded, others code 2 by name")
def quantized_source(box: Box) -> None:
    for method in ("fp8", "awq", "bitsandbytes"):
        folder = configure(box.model(), quantization_config={"quant_method": method})
        box.compress(folder).be(2, f"already quantized ({method})")

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    box.compress(weights(box.model(), pack)).be(2, "already quantized", "I8", "up_proj")
    folder = box.model()
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})
    box.compress(folder)  # named gptq, but holds ordinary weights: decoded or refused
    assert box.last.code in (0, 2), box.last.short()
    run = box.packed()
    box.compress(run / "checkpoint").be(2, "already quantized (aptq)")


def _deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@case(28, "unsafe inputs", "code 2 each: pickles, code, paths, links, bombs; nothing is run")
def unsafe(box: Box) -> None:
    folder = box.model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    box.compress(folder).be(2, "pickles", "safetensors")
    trap = box.root / "trap"
    code = f"open({str(trap)!r}, 'w').write('run')\n"
    folder = box.model()
    (folder / "modeling_x.py").write_text(code)
    maps = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    configure(folder, auto_map=maps)
    box.compress(folder).be(2, "never run")
    folder = box.model()
    (folder / "tok.py").write_text(code)
    mapped = {"auto_map": {"AutoTokenizer": ["tok.T", "tok.T"]}, "tokenizer_class": "T"}
    edit(folder / "tokenizer_config.json", lambda data: data.update(mapped))
    seen = box.compress(folder, how=GPTQ)
    assert seen.code in (0, 2), seen.short()
    for changes in (
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"experts_implementation": "someone/kernel"},
        {"hidden_act": "os.system"},
        {"torch_dtype": "load", "dtype": "load"},
        {"num_hidden_layers": 1 << 40},
        {"hidden_size": "48"},
        {"rope_scaling": {"rope_type": "__import__('os')"}},
    ):
        seen = box.compress(configure(box.model(), **changes))
        assert (seen.code in (0, 2), seen.seconds < 10) == (True, True), (changes, seen)
    assert not trap.exists(), "code of a folder was run"
    _paths(box)
    _bombs(box)


def _paths(box: Box) -> None:
    """Shards, small files and checkpoints that point out of their folder."""
    folder = box.model(sharded=True)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    outside = box.root / "outside.safetensors"
    outside.write_bytes(shard.read_bytes())
    index = folder / "model.safetensors.index.json"

    def lead_out(data: dict) -> None:  # type: ignore[type-arg]
        where = data["weight_map"]
        data["weight_map"] = {
            name: "../outside.safetensors" if file == shard.name else file
            for name, file in where.items()
        }

    edit(index, lead_out)
    box.compress(folder).be(2, "outside.safetensors")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        folder = box.model()
        target = box.root / f"secret {name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)
        box.compress(folder).be(2, "leads out of its folder", name)
    run = box.packed()
    held = run / "checkpoint" / "config.json"
    held.rename(box.root / "config elsewhere")
    held.symlink_to(box.root / "config elsewhere")
    box.run("verify", run).be(6, "leads out of its folder")


def _bombs(box: Box) -> None:
    """JSON that nests without end, and a pattern of 10 MB."""
    for name in ("config.json", "model.safetensors.index.json", "tokenizer_config.json"):
        folder = box.model(sharded=True)
        (folder / name).write_text(_deep(100_000))
        seen = box.compress(folder, how=GPTQ).be(2, name)
        assert seen.seconds < 10, seen.seconds
    folder = box.model()
    pattern = "(a|aa)+" * (10 << 20 >> 3)
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    edit(folder / "tokenizer.json", lambda data: data.update(pre_tokenizer=split))
    seen = box.compress(folder, how=GPTQ).be(2, "tokenizer.json")
    assert seen.seconds < 10, seen.seconds
