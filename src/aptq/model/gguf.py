"""A .gguf file as a source: checked, dequantized once and kept as a safetensors folder.

The checks bound every length by the file size before any other reader sees the file
(gguf 0.19 itself can be made to hang by a few bytes).
"""

import hashlib
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from gguf import GGML_QUANT_SIZES
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aptq.model.cache import once

_SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}  # weights, bytes of a block
_STRING, _ARRAY = 8, 9
# Bytes of the fixed-width value types of GGUF: u8 i8 u16 i16 u32 i32 f32 bool, u64 i64 f64.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_DIMENSIONS = 4
_MOST = 1 << 20  # keys, or tensors; a header of a large model has 10^3
_KEY, _NAME = 1 << 16, 64  # bytes, as GGML limits them


def converted(path: Path, cache: Path | None, dtype: torch.dtype) -> Path:
    """The safetensors folder of a .gguf file under `cache` (default ~/.cache/aptq), made on the
    first use in `dtype`.

    The conversion holds the whole model in memory once.  Raises ValueError for a damaged file or
    a family that transformers cannot dequantize.
    """
    check(path)
    name = f"{path.stem}-{_identity(path, dtype)}"
    return once(cache, "gguf", name, lambda made: _convert(path, made, dtype))


def _identity(path: Path, dtype: torch.dtype) -> str:
    """A hash of size, time, both ends of the file and the dtype: enough to notice a new file."""
    state, digest = path.stat(), hashlib.sha256()
    digest.update(f"{state.st_size} {state.st_mtime_ns} {dtype}".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, state.st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _convert(path: Path, target: Path, dtype: torch.dtype) -> None:
    folder, name = path.parent, path.name
    try:
        model = _dequantized(folder, name, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    except Exception as error:  # whatever transformers raises on values that it never expected
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"transformers cannot dequantize this .gguf file\n{path}: {reason}\n"
            "give the original Hugging Face folder of the model"
        ) from error
    tied = model.all_tied_weights_keys
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _dequantized(folder: Path, name: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        from transformers import GgufConfig
    except ImportError:  # before 5.2x every .gguf was dequantized
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=dtype, local_files_only=True
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=dtype,
            quantization_config=GgufConfig(gguf_file=name, dequantize=True),
            local_files_only=True,
        )
    assert isinstance(model, PreTrainedModel)
    return model


class _Reader:
    """Little-endian values of a file, none of them beyond its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def number(self, code: str) -> int:
        """One value of a struct code."""
        width = struct.calcsize(f"<{code}")
        data = self.file.read(width)
        if len(data) < width:
            raise EOFError
        return int(struct.unpack(f"<{code}", data)[0])

    def count(self, smallest: int) -> int:
        """A count of records of at least `smallest` bytes each, which must still fit."""
        count = self.number("Q")
        if count * smallest > self.size - self.file.tell():
            raise EOFError
        return count

    def name(self, what: str, most: int, known: set[bytes]) -> bytes:
        """A name of 1 to `most` bytes of UTF-8 that is not yet `known`; it is from here on."""
        length = self.count(1)
        text = self.file.read(length) if length <= most else b""
        if not text or text in known:
            reason = f"{what} twice: {text[:80]!r}" if text else f"{what} of {length} bytes"
            raise ValueError(reason)
        text.decode()
        known.add(text)
        return text

    def skip_value(self, kind: int) -> None:
        """Skip a value of a GGUF type."""
        if kind == _STRING:
            self.file.seek(self.count(1), os.SEEK_CUR)
        elif kind == _ARRAY:
            inner = self.number("I")
            if inner in _WIDTHS:
                self.file.seek(self.count(_WIDTHS[inner]) * _WIDTHS[inner], os.SEEK_CUR)
            elif inner == _STRING:
                for _ in range(self.count(8)):
                    self.skip_value(_STRING)
            else:
                raise ValueError(f"an array of type {inner}")
        elif kind in _WIDTHS:
            self.file.seek(_WIDTHS[kind], os.SEEK_CUR)
        else:
            raise ValueError(f"a value of type {kind}")


def check(path: Path) -> None:
    """Walk the header of a .gguf file within its size; ValueError for anything unsound."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            _check_header(_Reader(file, size))
    except (EOFError, ValueError, struct.error) as error:
        reason = str(error) or "a length in the header reaches beyond the end"
        raise ValueError(
            f"this is no sound .gguf file\n{path} ({size:,} bytes): {reason}\n"
            "copy or download the file again"
        ) from error


def _check_header(reader: _Reader) -> None:
    if reader.file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, known are 2 and 3")
    tensors, values = reader.count(24), reader.count(13)
    if max(tensors, values) > _MOST:
        raise ValueError(f"{values} keys, {tensors} tensors")
    alignment, blocks, keys = 32, 0, set[bytes]()
    for _ in range(values):
        key = reader.name("a key", _KEY, keys)
        kind = reader.number("I")
        if key == b"general.alignment" and kind == 4:
            alignment = reader.number("I")
        elif key.endswith(b".block_count") and kind == 4:
            blocks = reader.number("I")
        else:
            reader.skip_value(kind)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is no power of two")
    if blocks > tensors:
        raise ValueError(f"{blocks} blocks, but {tensors} tensors")
    names, ends = set[bytes](), [0]
    for _ in range(tensors):
        name = reader.name("a tensor", _NAME, names)
        ends.append(_tensor_end(reader, name.decode(), alignment))
    start = -(-reader.file.tell() // alignment) * alignment
    if start + max(ends) > reader.size and tensors:
        raise ValueError(f"{start + max(ends):,} bytes expected: a tensor lies beyond the end")


def _tensor_end(reader: _Reader, name: str, alignment: int) -> int:
    """Where a tensor ends, in bytes behind the header, by its dimensions, type and offset."""
    dimensions = reader.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = [reader.number("Q") for _ in range(dimensions)]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in _SIZES:
        raise ValueError(f"{name} is of unknown type {kind}")
    block, width = _SIZES[kind]
    if min(shape) < 1 or shape[0] % block or offset % alignment:
        raise ValueError(f"{name} has shape {shape} in blocks of {block} at offset {offset}")
    end: int = offset + math.prod(shape) // block * width
    return end
