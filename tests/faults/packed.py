"""Case 29: what this program has written comes back changed, mixed up or from the future."""

import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.faults.bench import Box, case, edit

HANG = b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60) + bytes(43 - 24)
LAYER = "model.layers.0.self_attn.q_proj"


@case(29, "output tampered with, or of another version", "code 6 each (GGUF 2), none hangs")
def tampered(box: Box) -> None:
    run = box.packed("--keep", "*.o_proj")
    held = run / "checkpoint"
    box.run("verify", run).be(0)
    shard = sorted(held.glob("model-*.safetensors"))[0]

    def again(change, *words: str) -> None:  # type: ignore[no-untyped-def]
        copy = box.root / "copy"
        shutil.copytree(held, copy)
        change(copy)
        box.run("verify", copy).be(6, *words)
        assert box.last.seconds < 5, box.last.seconds
        shutil.rmtree(copy)

    def tensors(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
        found = load_file(folder / shard.name)
        change(found)
        save_file(found, folder / shard.name, metadata={"format": "pt"})
        if (folder / "aptq.json").is_file():  # a forger would set the hash right
            from aptq.store.headers import hash_file

            digest = hash_file(folder / shard.name)
            edit(folder / "aptq.json", lambda data: data["files"].update({shard.name: digest}))

    def flip(folder: Path) -> None:
        data = bytearray((folder / shard.name).read_bytes())
        data[-1] ^= 1
        (folder / shard.name).write_bytes(data)

    def swap(folder: Path) -> None:
        shards = sorted(folder.glob("model-*.safetensors"))
        one, two = shards[0].read_bytes(), shards[1].read_bytes()
        shards[0].write_bytes(two)
        shards[1].write_bytes(one)

    def set_bits(folder: Path) -> None:
        edit(
            folder / "aptq.json",
            lambda data: data["plan"].update(
                grids=[grid.replace("int4", "int3") for grid in data["plan"]["grids"]]
            ),
        )

    again(flip, shard.name, "SHA-256")
    again(swap)
    again(set_bits, "plans")
    again(
        lambda f: edit(f / "aptq.json", lambda d: d.update(version=9)), "version 9", "pip install"
    )
    again(lambda f: edit(f / "aptq.json", lambda d: d.update(more=1)), "unknown keys")
    again(lambda f: (f / "aptq.json").write_text("{" * 100_000), "aptq.json")
    again(lambda f: tensors(f, lambda t: t.pop(f"{LAYER}.parts.0.scale")), "scale")

    def poison(found: dict[str, torch.Tensor]) -> None:
        found[f"{LAYER}.parts.0.scale"].view(-1)[0] = torch.nan

    again(lambda f: tensors(f, poison), f"{LAYER}.parts.0.scale", "1 of")
    box.run("generate", held, "x", "--tokens", "1").be(0)
    _ggufs(box)


def _ggufs(box: Box) -> None:
    path = box.root / "x.gguf"
    for data in (HANG, b"GGUF", b"GGML" + HANG[4:], HANG[:4] + struct.pack("<I", 99) + HANG[8:]):
        path.write_bytes(data)
        seen = box.compress(path).be(2, "no sound .gguf file")
        assert seen.seconds < 1, seen.seconds
