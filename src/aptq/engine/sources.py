"""Where calibration text comes from: files, hub data sets and text that Python carries.

A source gives documents or ready token ids.  `check` reads only its beginning, so that wrong data
is refused before a model or a tokenizer is loaded.
"""

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Kind = Literal["builtin", "hub", "self", "text", "jsonl", "json", "parquet", "npy", "safetensors"]
ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".npy": "npy",
    ".safetensors": "safetensors",
}
BUILTIN = "builtin:pydoc"
HEAD = 1 << 16  # bytes that `check` looks at; characters read from a text file at a time
MAGIC = {  # first bytes of what is passed by mistake
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    b"PK\x03\x04": "a zip archive (torch.save and .npz files are zip archives too)",
    b"PAR1": "a parquet file without the ending .parquet",
    b"\x93NUMPY": "a numpy file without the ending .npy",
    b"GGUF": "a GGUF model",
    b"%PDF": "a PDF document",
    codecs.BOM_UTF16_LE: "UTF-16 or UTF-32 text",
    codecs.BOM_UTF16_BE: "UTF-16 text",
}


class Fields(NamedTuple):
    """How documents are found in rows: the key of the text; split and configuration of hub sets."""

    key: str
    split: str
    config: str


class Text(NamedTuple):
    """Concatenated documents; `whole` is False where reading stopped at the character limit."""

    text: str
    whole: bool


def kind(source: str) -> Kind:
    """What a source is, by its prefix or the ending of its file name."""
    if source == "self":
        return "self"
    if source.startswith("builtin:"):
        return "builtin"
    if source.startswith("hub:"):
        return "hub"
    return ENDINGS.get(Path(source).suffix.lower(), "text")


def check(source: str, fields: Fields) -> None:
    """Refuse a source that gives no text; milliseconds for a file, a request for a hub data set.

    Raises ValueError: file missing, empty, compressed, binary or in another encoding; key not in
    the rows; unknown built-in text; optional package missing; ids that are not integers.
    """
    form = kind(source)
    if form == "self":
        return
    if form not in ("builtin", "hub"):
        _check_file(Path(source))
    if form in ("text", "jsonl", "json"):
        _check_head(Path(source))
    if form in ("npy", "safetensors"):
        read_ids(source)
    elif not any(piece.strip() for piece in _pieces(source, fields)):
        where = f"{source}: every document is empty or white space"
        raise _bad("the calibration source holds no text", where, f"use another, or {BUILTIN}")


def read_text(source: str, fields: Fields, characters: int | None = None) -> Text:
    """The documents of a source joined by an empty line, a text file as it is.

    Reading stops after `characters`.  Raises ValueError as `check` does, for any row or byte read.
    """
    glue = "" if kind(source) == "text" else "\n\n"
    read, parts = 0, list[str]()
    for piece in _pieces(source, fields):
        parts.append(piece)
        read += len(piece) + len(glue)
        if characters is not None and read >= characters:
            return Text(glue.join(parts)[:characters], whole=False)
    return Text(glue.join(parts), whole=True)


def read_ids(source: str) -> Tensor:
    """Token ids of an .npy or .safetensors file (its one tensor, or "ids"), int64 [tokens].

    Arrays of more dimensions are flattened.  Raises ValueError: damaged file, no integers, empty,
    negative ids.
    """
    try:
        if kind(source) == "npy":
            ids = torch.from_numpy(np.load(source, allow_pickle=False))
        else:
            with safe_open(source, framework="pt") as file:
                names = sorted(file.keys())
                ids = file.get_tensor(names[0] if len(names) == 1 else "ids")
    except (ValueError, TypeError, EOFError, SafetensorError) as error:
        advice = 'save one integer array, or a tensor named "ids"'
        raise _bad("the token ids cannot be read", f"{source}: {error}", advice) from error
    integer = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
    stream = ids.to(torch.int64).reshape(-1)
    if not integer or stream.numel() == 0 or int(stream.min()) < 0:
        where = f"{source}: {ids.dtype}, shape {list(ids.shape)}"
        raise _bad("the file holds no token ids", where, "save integers >= 0, such as int32")
    return stream


def _check_file(path: Path) -> None:
    if not path.exists():
        advice = f"correct the path, or use hub:NAME for a hub data set, or {BUILTIN}"
        raise _bad("the calibration file does not exist", str(path), advice)
    if not path.is_file():
        raise _bad("the calibration source is no regular file", str(path), "pass one file")
    if path.stat().st_size == 0:
        raise _bad("the calibration file is empty", f"{path}: 0 bytes", "pass a file with text")


def _check_head(path: Path) -> None:
    """Refuse bytes that are not UTF-8 text; a character cut by the end of the head is no error."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    problem = next((name for magic, name in MAGIC.items() if head.startswith(magic)), "")
    if not problem and b"\0" in head:
        problem = f"zero byte at {head.index(0)}: binary data, or UTF-16 without a mark"
    if not problem:
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD)
        except UnicodeDecodeError as error:
            byte = head[error.start]
            problem = f"byte 0x{byte:02x} at {error.start}: binary data or another encoding"
    if problem:
        advice = "unpack it, or convert it to UTF-8 (iconv -t utf-8)"
        raise _bad("the calibration file is not UTF-8 text", f"{path}: {problem}", advice)


def _pieces(source: str, fields: Fields) -> Iterator[str]:
    """Documents of a source, or blocks of a text file."""
    form = kind(source)
    if form == "builtin":
        return _builtin(source)
    if form == "hub":
        return _hub(source, fields)
    path = Path(source)
    if form == "text":
        return _blocks(path)
    assert form in ("jsonl", "json", "parquet"), form
    return {"jsonl": _jsonl, "json": _json, "parquet": _parquet}[form](path, fields.key)


def _builtin(source: str) -> Iterator[str]:
    if source != BUILTIN:
        raise _bad("unknown built-in calibration text", source, f"use {BUILTIN}")
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _blocks(path: Path) -> Iterator[str]:
    with _utf8(path), path.open(encoding="utf-8-sig") as file:
        while block := file.read(HEAD):
            yield block


def _jsonl(path: Path, key: str) -> Iterator[str]:
    with _utf8(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _text(_parse(line, where), key, where)


def _json(path: Path, key: str) -> Iterator[str]:
    with _utf8(path):
        rows = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _text(row, key, f"{path}, row {number}")


def _parquet(path: Path, key: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise _bad("parquet files need pyarrow", str(path), "pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's own errors are kinds of these
        where = f"{path}: {error}"
        raise _bad("the parquet file cannot be read", where, "copy or write it again") from error
    if key not in file.schema_arrow.names:
        raise _no_key(key, file.schema_arrow.names, str(path))
    row = 0
    for batch in file.iter_batches(columns=[key], batch_size=256):
        for value in batch.column(0).to_pylist():
            row += 1
            yield _text({key: value}, key, f"{path}, row {row}")


def _hub(source: str, fields: Fields) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise _bad("hub data sets need datasets", source, "pip install datasets") from error
    name, config = source.removeprefix("hub:"), fields.config or None
    try:
        rows = load_dataset(name, config, split=fields.split, streaming=True)
    except Exception as error:  # of several packages: network, unknown name, split or config
        where = f"{source}, split {fields.split}: {error}".replace("\n", " ")
        advice = "check name and network, or pass a local file; nothing else is taken instead"
        raise _bad("the hub data set cannot be opened", where, advice) from error
    for number, row in enumerate(rows, 1):
        yield _text(row, fields.key, f"{source}, row {number}")


def _text(row: Any, key: str, where: str) -> str:
    """The document in one row: the row itself if it is a string, else its value under `key`."""
    if isinstance(row, dict) and key not in row:
        raise _no_key(key, list(row), where)
    value = row[key] if isinstance(row, dict) else row
    if not isinstance(value, str):
        advice = "each row must be a string, or an object with a string under text_key"
        where = f"{where}: {type(value).__name__} instead of text"
        raise _bad("the calibration row holds no text", where, advice)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell what no tokenizer accepts
        where = f"{where}: half of a surrogate pair at character {error.start}"
        raise _bad("the calibration row is not valid text", where, "repair the row") from error
    return value


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        advice = "a .jsonl file holds one object a line, a .json file one list"
        raise _bad("the calibration file is not valid JSON", f"{where}: {error}", advice) from error


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        where = f"{path}: byte 0x{error.object[error.start]:02x}, {error.reason}"
        advice = "convert it to UTF-8 (iconv -t utf-8)"
        raise _bad("the calibration file is not UTF-8 text", where, advice) from error


def _no_key(key: str, present: list[str], where: str) -> ValueError:
    names = ", ".join(str(name) for name in present[:12]) or "none"
    return _bad(
        "the calibration data lacks the key of the text",
        f"{where}: no {key!r}; keys present: {names}",
        "set text_key to the key that holds the text",
    )


def _bad(what: str, where: str, advice: str) -> ValueError:
    return ValueError(f"{what}\n{where}\n{advice}")
