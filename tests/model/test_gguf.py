"""A .gguf file is checked, dequantized once, and then an ordinary folder."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from aptq.model import gguf as ours
from aptq.model.model import Model

_WIDTH, _HEADS, _INNER = 64, 4, 96


def _write(path: Path) -> dict[str, np.ndarray]:
    """A Llama of one block with float32 tensors and a byte-level tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "ab", "cd", "<s>", "</s>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), _WIDTH),
        "output": (len(tokens), _WIDTH),
        "output_norm": (_WIDTH,),
        "blk.0.attn_norm": (_WIDTH,),
        "blk.0.ffn_norm": (_WIDTH,),
        "blk.0.ffn_gate": (_INNER, _WIDTH),
        "blk.0.ffn_up": (_INNER, _WIDTH),
        "blk.0.ffn_down": (_WIDTH, _INNER),
    }
    shapes |= {f"blk.0.attn_{part}": (_WIDTH, _WIDTH) for part in ("q", "k", "v", "output")}
    tensors = {
        f"{name}.weight": draw.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "small.gguf", tmp_path / "cache"
    stored = _write(file)
    model = Model.open(file, dtype=torch.float32, cache=cache)
    assert model.source == "small"
    assert model.arch.attention == "self_attn"
    down = model.load(0).get_submodule("mlp.down_proj").weight
    assert torch.equal(down, torch.from_numpy(stored["blk.0.ffn_down.weight"]))
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in model.files()}
    assert model.tokenizer("ab").input_ids[-1] == 256

    monkeypatch.setattr(ours, "_convert", lambda *_: pytest.fail("converted again"))
    again = Model.open(file, dtype=torch.float32, cache=cache)
    assert again.shapes == model.shapes
    assert sorted(path.name for path in (cache / "gguf").iterdir()) == [model.folder.name]


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _head(tensors: int, values: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (_head(0, 0, version=9), "version 9"),
        (b"GGUF" + bytes([3, 0, 0]), "beyond the end"),
        (_head(1 << 60, 0), "beyond the end"),
        (_head(0, 1 << 60) + bytes(40), "beyond the end"),
        (_head(0, 1) + struct.pack("<Q", 1 << 40) + bytes(40), "beyond the end"),
        (_head(0, 1) + _text(b"a") + struct.pack("<I", 77) + bytes(40), "value of type 77"),
        (_head(0, 1) + _text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "array of type 9"),
        (_head(0, 1) + _text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60) + bytes(40), "beyond"),
        (_head(0, 1) + _text(b"general.alignment") + struct.pack("<II", 4, 3), "power of two"),
        (_head(1, 0) + _text(b"t") + struct.pack("<I", 99) + bytes(90), "99 dimensions"),
        (_head(1, 0) + _text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 40), "beyond the end"),
        (_head(1, 0) + _text(b"t") + struct.pack("<IQIQ", 1, 64, 0, 0) + bytes(99), "beyond"),
        (_head(1, 0) + _text(b"t") + struct.pack("<IQIQ", 1, 4, 99, 0), "unknown type 99"),
        (_head(1, 0) + _text(b"t") + struct.pack("<IQIQ", 1, 31, 2, 0), "in blocks of 32"),
        (_head(1, 0) + _text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0), "shape"),
        (_head(1, 0) + _text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1), "at offset 1"),
        (_head(1, 0) + _text(b"t") + struct.pack("<I", 0) + bytes(90), "0 dimensions"),
        (_head(1, 0) + _text(b"t" * 65) + bytes(90), "a tensor of 65 bytes"),
        (_head(1, 0) + _text(b"") + bytes(90), "a tensor of 0 bytes"),
        (_head(2, 0) + (_text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2 + bytes(90), "twice"),
        (_head(0, 2) + (_text(b"a") + struct.pack("<II", 4, 1)) * 2, "a key twice"),
        (_head(0, 1) + _text(b"x.block_count") + struct.pack("<II", 4, 9), "9 blocks"),
    ],
)
def test_unsound_files_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=reason) as caught:
        Model.open(file, cache=tmp_path / "cache")
    assert len(str(caught.value).split("\n")) == 3
    assert not (tmp_path / "cache").exists()


def test_a_family_that_cannot_be_dequantized(tmp_path: Path) -> None:
    file = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(file, "no-such-family")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="transformers cannot dequantize this"):
        Model.open(file, cache=tmp_path / "cache")
    assert not any((tmp_path / "cache" / "gguf").iterdir())
