"""Who may go on with an unfinished run: its identity, and the lock of its one writer."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from aptq.failures import Corrupt
from aptq.store.headers import hash_file

Resume = Literal["auto", "never", "required"]
SHOWN = 8  # differences that an error lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """All that decides the bytes of a run; `recorded` decides them too where machines differ."""

    package: str  # version of aptq
    source: dict[str, str]  # file -> SHA-256, or size and time of change of weights
    data: str  # SHA-256 of the calibration tokens, "" without any
    recipe: dict[str, str]  # dotted key -> value; grids, stages, seed, order and all else
    given: dict[str, str]  # SHA-256 of the plan and the scores that were given, "" without any
    dtype: str
    recorded: dict[str, str]  # torch, transformers, threads, device

    def check(self, old: Mapping[str, Any], folder: Path) -> list[str]:
        """Differences to the identity `old` that only need a warning: "threads: 1 -> 2".

        Raises ValueError that lists the others, Corrupt if `old` is none.
        """
        if old.keys() != {item.name for item in fields(self)}:
            raise Corrupt(
                f"the state of an unfinished run has no identity\n{folder}: {sorted(old)}\n"
                f"remove {folder} and start again"
            )
        changed = differences(old, asdict(self))
        soft = [line for line in changed if line.startswith("recorded.") and not _major(line)]
        hard = [line for line in changed if line not in soft]
        if hard:
            more = f"; and {len(hard) - SHOWN} more" if len(hard) > SHOWN else ""
            raise ValueError(
                "the unfinished run was begun with something else\n"
                f"{'; '.join(hard[:SHOWN])}{more}\n"
                f"give what it was begun with, or remove {folder}, or choose another --out"
            )
        return [line.removeprefix("recorded.") for line in soft]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: old -> new", nested keys with dots."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        one, two = old.get(key, "nothing"), new.get(key, "nothing")
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            lines += differences(one, two, f"{prefix}{key}.")
        elif one != two:
            lines.append(f"{prefix}{key}: {one} -> {two}")
    return lines


def _major(line: str) -> bool:
    """Does a line tell of another major version of a library, or another kind of device?"""
    key, _, values = line.removeprefix("recorded.").partition(": ")
    old, _, new = values.partition(" -> ")
    if key in ("torch", "transformers"):
        return old.split(".")[0] != new.split(".")[0]
    return key == "device" and (old == "cpu") != (new == "cpu")


def source_files(folder: Path, *, whole: bool) -> dict[str, str]:
    """What identifies the files of a model: SHA-256 of the small ones and, if `whole`, of all.

    Else weights are known by their size and time of change.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt") or (
            whole and path.suffix == ".safetensors"
        ):
            found[path.name] = hash_file(path)
        elif path.suffix == ".safetensors":
            stat = path.stat()
            found[path.name] = f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return found


class Lock:
    """One writer for a folder: the file `path` tells process, host and time while it is held.

    The system frees the lock of a process that has died; of other hosts nothing is known, so their
    mark has to be removed by hand.  Raises ValueError if somebody else holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._refuse("wait for it, or choose another --out")
        owner = self._owner()
        if owner.get("host", platform.node()) != platform.node():
            self._refuse(f"wait for it; if it has ended, remove {path}")
        mark = {"pid": os.getpid(), "host": platform.node(), "start": time.strftime("%F %T %z")}
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, json.dumps(mark).encode(), 0)

    def release(self) -> None:
        """Free it, with its mark."""
        os.ftruncate(self.handle, 0)
        os.close(self.handle)

    def _owner(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self.handle, 4096, 0))
        except ValueError:  # empty, or cut off by a crash
            return {}
        return found if isinstance(found, dict) else {}

    def _refuse(self, instead: str) -> NoReturn:
        owner = self._owner()
        os.close(self.handle)
        raise ValueError(
            f"another process is at work on this output\n{self.path.parent}: process "
            f"{owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('start', '?')}\n"
            f"{instead}"
        )
