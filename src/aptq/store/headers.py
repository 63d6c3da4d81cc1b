"""safetensors files: their exact size before they exist, crash-safe writing, checked headers.

Files are written here, so that predicted and real bytes come from the same code; they are read
only through the safetensors library.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aptq.core.parts import Spec
from aptq.store.manifest import corrupt

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def spec_of(tensor: Tensor) -> Spec:
    """dtype and shape."""
    return tensor.dtype, tuple(tensor.shape)


def order(specs: Mapping[str, Spec]) -> list[str]:
    """Names as they follow in a file: wide dtypes first, so that each tensor is aligned."""
    return sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))


def header(specs: Mapping[str, Spec]) -> bytes:
    """Everything before the data: length, JSON, and spaces up to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order(specs):
        end = offset + nbytes(specs[name])
        dtype, shape = specs[name]
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    return spec[0].itemsize * math.prod(spec[1])


def file_size(specs: Mapping[str, Spec]) -> int:
    """Bytes of a file with these tensors."""
    return len(header(specs)) + sum(nbytes(spec) for spec in specs.values())


def tensor_chunks(tensors: Mapping[str, Tensor]) -> Iterable[bytes | memoryview]:
    """The content of a file with these tensors, piece by piece."""
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    yield header(specs)
    for name in order(specs):
        flat = tensors[name].detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


def publish(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a file that appears under its name only when it is complete on disk; its SHA-256."""
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name survives a power cut too
    finally:
        os.close(folder)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_specs(path: Path) -> dict[str, Spec]:
    """dtype and shape of every tensor in a file.  Raises Corrupt for a damaged or cut file."""
    specs: dict[str, Spec] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                entry = file.get_slice(name)
                if entry.get_dtype() not in _TORCH:
                    corrupt("unknown dtype in a weight file", f"{path}: {name}")
                specs[name] = (_TORCH[entry.get_dtype()], tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        corrupt("a weight file is damaged, cut off or missing", f"{path}: {size} ({error})")
    return specs


def check_headers(files: Sequence[str], wanted: Mapping[str, Tensor], tied: Set[str]) -> None:
    """Raise Corrupt unless the files hold exactly the tensors of a (meta) state dict.

    Names in `tied` may be missing.  Only parts must have the very dtype: what is kept in floating
    point may be loaded in another one.
    """
    found: dict[str, Spec] = {}
    for file in files:
        found |= read_specs(Path(file))
    where = str(Path(files[0]).parent) if files else "the checkpoint"
    missing = sorted(wanted.keys() - found.keys() - tied)
    unknown = sorted(found.keys() - wanted.keys())
    for what, names in (("missing from", missing), ("unknown in", unknown)):
        if names:
            shown = f"{len(names)} tensors, first {', '.join(names[:3])}"
            corrupt(f"tensors are {what} a checkpoint", f"{where}: {shown}")
    for name, (dtype, shape) in found.items():
        expected = spec_of(wanted[name])
        exact = ".parts." in name or not dtype.is_floating_point
        if shape != expected[1] or (exact and dtype != expected[0]):
            misfit(where, name, (dtype, shape), expected)


def misfit(where: Path | str, name: str, found: Spec, expected: Spec) -> None:
    """Raise Corrupt for a tensor of another dtype or shape than the plan says."""
    shown = f"{found[0]} {list(found[1])} found, {expected[0]} {list(expected[1])} expected"
    corrupt("a stored tensor does not fit the plan", f"{where}: {name}: {shown}")
