"""Mutated files of every kind that this program reads: only its own errors, none slow, memory flat.

python benchmarks/fuzz.py [--count 100000] [--seed 0] [--only gguf] [--out results.json]

Each input is a valid file with a few mutations: bits, bytes, cuts, copies, swaps, numbers at the
edges, and in JSON and TOML also changed values, keys and nesting.  Seeds are the numbers 0, 1, ...,
so that a failure is repeated by --seed N --count 1.
"""

import argparse
import json
import platform
import random
import resource
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from aptq.core.grid import Grid
from aptq.core.parts import nearest_part
from aptq.core.plan import Plan, Target
from aptq.core.scores import Scores
from aptq.failures import Corrupt
from aptq.model.gguf import check
from aptq.model.skeleton import safe_config
from aptq.model.weights import Shards
from aptq.recipe import Recipe, shipped_names
from aptq.store.headers import read_specs, tensor_chunks
from aptq.store.manifest import Manifest

SLOW = 1.0  # seconds of this process; of the clock ten times as much, for the machine may be busy
Bytes = bytes | bytearray
EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 62, 1 << 63)
WORDS = (
    *("null", "true", "-1", "0", "1e999", "NaN", "[]", "{}", '""', "9" * 400, "1.5", '"keep"'),
    *('"../x"', '"\\u0000"', '"int4-g0-z"', '"int4-g999999999"', '"%s{}"', '"' + "a" * 300 + '"'),
)


class Kind(NamedTuple):
    """A kind of file: valid examples, who reads it under which name, whether it is text."""

    examples: list[bytes]
    read: Callable[[Path], object]
    name: str
    text: bool
    error: type[Exception]


def mutated(data: bytes, draw: random.Random, *, text: bool) -> bytes:
    """A copy with one to four mutations."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        choices = [_flip, _cut, _copy, _edge] + ([_value, _value, _nest, _key] if text else [_edge])
        draw.choice(choices)(found, draw)
    return bytes(found)


def _flip(data: bytearray, draw: random.Random) -> None:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data) + 1) :]


def _copy(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) + 1)
    piece = data[start : start + draw.randrange(64)]
    at = draw.randrange(len(data) + 1)
    data[at:at] = piece * draw.choice((1, 1, 2, 50))


def _edge(data: bytearray, draw: random.Random) -> None:
    """A number of 1, 4 or 8 bytes, most often in the head."""
    width = draw.choice((1, 4, 8, 8))
    at = draw.randrange(max(1, min(len(data), draw.choice((24, 200, len(data) or 1)))))
    value = (draw.choice(EDGES) + draw.choice((-1, 0, 0, 1))) % (1 << (8 * width))
    data[at : at + width] = value.to_bytes(width, "little")


def _spans(data: bytearray, draw: random.Random) -> tuple[int, int]:
    """Where some value between separators begins and ends."""
    at = draw.randrange(len(data) + 1)
    start = max((data.rfind(mark, 0, at) for mark in (b":", b",", b"[", b"=")), default=-1) + 1
    ends = [end for mark in (b",", b"}", b"]", b"\n") if (end := data.find(mark, start)) >= 0]
    return start, min(ends, default=len(data))


def _value(data: bytearray, draw: random.Random) -> None:
    start, end = _spans(data, draw)
    data[start:end] = draw.choice(WORDS).encode()


def _nest(data: bytearray, draw: random.Random) -> None:
    start, end = _spans(data, draw)
    depth = draw.choice((1, 3, 500, 5000))
    opened, closed = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    data[start:end] = opened * depth + bytes(data[start:end]) + closed * depth


def _key(data: bytearray, draw: random.Random) -> None:
    marks = [i for i in range(len(data)) if data[i] == ord('"')]
    if marks:
        at = draw.choice(marks)
        data[at + 1 : at + 1] = draw.choice((b"x", b"../", b"\\", b"__class__", b"*" * 40))


def _tensors() -> dict[str, torch.Tensor]:
    part = nearest_part(torch.randn(8, 40), Grid.parse("int4-g16-z"))
    packed = {f"layer.parts.0.{name}": tensor for name, tensor in part.tensors().items()}
    return {**packed, "norm.weight": torch.ones(8, dtype=torch.bfloat16)}


def _manifest() -> bytes:
    names = [f"model.layers.{i}.mlp.{role}_proj" for i in range(3) for role in ("up", "down")]
    targets = [Target.parse(text) for text in ("int4-g16-z", "keep", "int3-row")]
    plan = Plan({name: targets[i % 3] for i, name in enumerate(names)})
    return Manifest(
        package="0.1.0",
        source="tiny",
        model_type="llama",
        dtype="bfloat16",
        tied=True,
        plan=plan,
        shapes={name: (40, 48) for name in names},
        files={"config.json": "0" * 64, "model-00001-of-00001.safetensors": "1" * 64},
    ).to_bytes()


def _gguf() -> bytes:
    def text(word: bytes) -> bytes:
        return struct.pack("<Q", len(word)) + word

    values = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    values += text(b"general.alignment") + struct.pack("<II", 4, 32)
    values += text(b"llama.block_count") + struct.pack("<II", 4, 1)
    values += text(b"tokens") + struct.pack("<IIQ", 9, 8, 3) + text(b"a") + text(b"b") + text(b"c")
    values += text(b"scores") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0)
    tensors = text(b"a.weight") + struct.pack("<IQQIQ", 2, 32, 4, 0, 0)
    tensors += text(b"b.weight") + struct.pack("<IQIQ", 1, 64, 2, 512)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 5) + values + tensors
    return head + bytes(-len(head) % 32) + bytes(512 + 36)


def kinds(folder: Path) -> dict[str, Kind]:
    """All kinds, with valid files made on the spot."""
    tensors = _tensors()
    packed = b"".join(bytes(chunk) for chunk in tensor_chunks(tensors))
    save_file(tensors, folder / "example")
    plain = (folder / "example").read_bytes()
    plan = Plan.uniform({f"l.{i}": (8, 40) for i in range(4)}, Grid.parse("int4-g16-z"), ["l.0"])
    plan.save(folder / "example")
    plans = (folder / "example").read_bytes()
    rows = dict.fromkeys(("l.0", "l.1"), (0.5, 0.25))
    scores = Scores("fisher", "nats", ("int4-g16-z", "keep"), rows, rows).text()
    recipes = [Recipe.load(name).text().encode() for name in shipped_names()]
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 48}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    (folder / "model.safetensors").write_bytes(plain)
    return {
        "manifest": Kind(
            [_manifest()], lambda p: Manifest.read(p.parent), "aptq.json", True, Corrupt
        ),
        "packed": Kind([packed], read_specs, "packed.safetensors", False, Corrupt),
        "safetensors": Kind([plain], _shards, "model.safetensors", False, ValueError),
        "index": Kind([json.dumps(index).encode()], _index, "index.json", True, ValueError),
        "gguf": Kind([_gguf()], check, "x.gguf", False, ValueError),
        "recipe": Kind(recipes, Recipe.load, "r.toml", True, ValueError),
        "plan": Kind([plans], Plan.load, "plan.json", True, ValueError),
        "scores": Kind([scores], Scores.load, "scores.json", True, ValueError),
        "config": Kind([json.dumps(config).encode()], _config, "config.json", True, ValueError),
    }


def _read_manifest(path: Path) -> object:
    return Manifest.read(path.parent)


def _shards(path: Path) -> object:
    return Shards(path.parent)


def _index(path: Path) -> object:
    place = path.parent / "indexed"
    place.mkdir(exist_ok=True)
    shard = place / "model.safetensors"
    if not shard.exists():
        shard.write_bytes((path.parent / "good.safetensors").read_bytes())
    (place / "model.safetensors.index.json").write_bytes(path.read_bytes())
    return Shards(place)


def _config(path: Path) -> object:
    return safe_config(path.parent)


class Report(NamedTuple):
    """What became of the inputs of one kind."""

    inputs: int
    accepted: int
    refused: int
    slowest: float
    wrong: list[str]


def tried(name: str, kind: Kind, folder: Path, count: int, seed: int) -> Report:
    """Read `count` mutated files of one kind."""
    path, outcome, slowest, wrong = folder / kind.name, Counter[str](), 0.0, list[str]()
    for number in range(seed, seed + count):
        draw = random.Random(f"{name} {number}")
        data = mutated(draw.choice(kind.examples), draw, text=kind.text)
        path.write_bytes(data)
        began, clock = time.process_time(), time.perf_counter()
        try:
            kind.read(path)
            outcome["accepted"] += 1
        except kind.error as error:
            outcome["refused"] += 1
            if len(str(error).splitlines()) != 3:
                wrong.append(f"seed {number}: {len(str(error).splitlines())} lines: {error!r:.200}")
        except Exception as error:
            wrong.append(f"seed {number}: {type(error).__name__}: {error!s:.200}")
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        if seconds > SLOW or time.perf_counter() - clock > 10 * SLOW:
            wrong.append(f"seed {number}: {seconds:.2f} s")
    return Report(count, outcome["accepted"], outcome["refused"], slowest, wrong)


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    """All kinds in turn; 1 if anything was wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=100_000, help="inputs of all kinds together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "good.safetensors").write_bytes(b"")
        known = kinds(folder)
        (folder / "good.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        names = list(known) if given.only is None else given.only.split(",")
        each = -(-given.count // len(names))
        for name in names:
            tried(name, known[name], folder, min(each, 200), given.seed)  # caches are filled
            before, began = resident(), time.perf_counter()
            found = tried(name, known[name], folder, each, given.seed)
            grown = resident() - before
            seconds = round(time.perf_counter() - began, 1)
            results[name] = {**found._asdict(), "grown": grown, "seconds": seconds}
            print(
                f"{name:<12} {found.inputs:>7} inputs: {found.accepted} read, {found.refused} "
                f"refused, slowest {found.slowest * 1e3:.1f} ms, memory {grown / 1e6:+.1f} MB, "
                f"{len(found.wrong)} wrong ({seconds} s)",
                flush=True,
            )
            print("\n".join(found.wrong[:10]))
    if given.out is not None:
        about = {"python": platform.python_version(), "torch": torch.__version__}
        given.out.write_text(json.dumps({**about, "seed": given.seed, "kinds": results}, indent=1))
    return 1 if any(found["wrong"] or found["grown"] > 64e6 for found in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
