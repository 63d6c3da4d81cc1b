"""A quantized Hugging Face folder as a source: its weights decoded once and kept as a folder.

One file a method; it knows the tensors of one linear.  Which linears are quantized is read from
the files, and how from config.json: tensors that fit none of its schemes are refused.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from aptq.model.cache import once
from aptq.model.quantized.compressed_tensors import CompressedTensors
from aptq.model.quantized.gptq import GPTQ
from aptq.model.sources import READ, refuse
from aptq.model.weights import Shards

SHARD = 1 << 30  # bytes of decoded tensors in memory at a time, and in a file
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
TRANSPOSED = ("gpt2", "openai-gpt")  # their linears hold [in, out]; quantized tensors do not


class Method(Protocol):
    """How the linears of a folder are quantized.

    leaves: last names of the tensors of a linear; each has the first, those of `optional` may be
    missing.  dropped: last names of tensors that say nothing about weights.
    """

    leaves: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    dropped: ClassVar[tuple[str, ...]]

    def weight(self, layer: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [out, in], computed in float32, of `tensors` by last name.

        Raises ValueError in three lines for dtypes, shapes and values that do not fit.
        """


METHODS: dict[str, Callable[[Mapping[str, Any], str], Method]] = {
    "gptq": GPTQ.read,
    "compressed-tensors": CompressedTensors.read,
}
assert METHODS.keys() == set(READ)


def converted(
    folder: Path,
    raw: Mapping[str, Any],
    files: Sequence[Path],
    cache: Path | None,
    dtype: torch.dtype | None,
) -> Path:
    """The folder with ordinary weights under `cache`, made on the first use in `dtype`.

    raw: config.json, whose dtype is taken for None; files: carried over.  About SHARD bytes are in
    memory at a time.  Raises ValueError for an unknown scheme and for tensors that do not fit.
    """
    config, where = raw["quantization_config"], str(folder / "config.json")
    try:
        method = METHODS[config["quant_method"]](config, where)
    except (TypeError, AttributeError) as error:  # a list where an object belongs
        refuse("quantization_config is broken", f"{where}: {error}", "copy the file again")
    dtype = dtype or _DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)

    def make(made: Path) -> None:
        _convert(Shards(folder), method, raw["model_type"] in TRANSPOSED, made, dtype)
        plain = {key: raw[key] for key in raw if key not in ("quantization_config", "torch_dtype")}
        (made / "config.json").write_text(json.dumps(plain | {"dtype": str(dtype)[6:]}, indent=2))
        for path in files:
            shutil.copyfile(path, made / path.name)

    return once(cache, "quantized", f"{folder.name}-{_identity(folder, dtype)}", make)


def _identity(folder: Path, dtype: torch.dtype) -> str:
    """A hash of the dtype, config.json, and name, size and time of all files."""
    digest = hashlib.sha256(f"{dtype}".encode() + (folder / "config.json").read_bytes())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _convert(
    shards: Shards, method: Method, transposed: bool, made: Path, dtype: torch.dtype
) -> None:
    first = f".{method.leaves[0]}"
    layers = {name.removesuffix(first) for name in shards.shapes if name.endswith(first)}
    inside = {f"{layer}.{leaf}" for layer in layers for leaf in method.leaves}
    batch: dict[str, Tensor] = {}
    where: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(batch, made / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(batch, name))
        batch.clear()

    for name in sorted((shards.shapes.keys() - inside) | layers):
        if name in layers:
            weight = method.weight(name, _tensors(shards, method, name), dtype)
            batch[f"{name}.weight"] = weight.T.contiguous() if transposed else weight
        elif name.rpartition(".")[2] not in method.dropped:
            batch[name] = shards.read(name)
        if sum(tensor.nbytes for tensor in batch.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": where}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(shards: Shards, method: Method, layer: str) -> dict[str, Tensor]:
    names = {leaf: f"{layer}.{leaf}" for leaf in method.leaves}
    for leaf, name in names.items():
        if name not in shards.shapes and leaf not in method.optional:
            where = f"{shards.folder}: {name}"
            refuse("a tensor of a quantized layer is missing", where, "copy the model again")
    return {leaf: shards.read(n) for leaf, n in names.items() if n in shards.shapes}
