"""Small files that strangers may have written: bounded before anything looks into them."""

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SMALL = 1 << 22  # bytes of a config or recipe at most; those of large models have 10^5
LISTS = 1 << 26  # of an index or a tokenizer
NAMES = 1 << 28  # of a plan, scores or aptq.json: 10^6 layers take 10^8
NESTED = 1 << 21  # objects and arrays in a file; each takes 64 bytes of memory and more


def read_bytes(path: Path, limit: int = SMALL) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises ValueError, one line, for larger ones and for what is no file (a pipe never ends);
    OSError where it cannot be read.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("no regular file")
    if state.st_size > limit:
        raise ValueError(f"{state.st_size:,} bytes, {limit:,} allowed")
    return path.read_bytes()


def parse_json(data: bytes) -> Any:
    """A JSON value.  Raises ValueError, one line; also for what is nested too deep or too much."""
    if (count := data.count(b"{") + data.count(b"[")) > NESTED:
        raise ValueError(f"{count:,} objects and lists, {NESTED:,} allowed")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def printable(text: object) -> str:
    """A name out of a file as one may show it: on one line, without control characters, short."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:200])
    return shown if len(str(text)) <= 200 else f"{shown}..."


def read_json(path: Path, limit: int = SMALL) -> Any:
    """As `parse_json`, of a file as `read_bytes` reads it."""
    return parse_json(read_bytes(path, limit))


def strays(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` that a link leads out of `folder`.

    In a snapshot of a hub cache links lead to the blobs beside it, as huggingface_hub makes them.
    """
    home = folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    return [p for p in paths if not any(p.resolve().is_relative_to(root) for root in roots)]
