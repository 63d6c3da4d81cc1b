"""Journal: what an unfinished run needs to go on, in files that nothing but whole writes change.

Objects are named by their SHA-256.  A generation is the object that lists the others with theirs;
the small file CURRENT names the two newest ones, so that a run goes on from the older where the
newest is damaged.  Tensors are safetensors, all else is JSON.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from aptq.failures import Corrupt
from aptq.store.headers import hash_file, publish, tensor_chunks
from aptq.store.manifest import closed, corrupt, read_json, to_json

VERSION = 1  # of the layout below
FOLDER, CURRENT, LOG = "work/state", "CURRENT", "log.jsonl"


@dataclass
class Journal:
    """State of the run that grows in `root`.

    values: anything JSON; files: name -> (path below root, SHA-256), objects or other files that
    will not change; the log's lines belong to a generation too.  `load` and `publish` move all
    of it together.
    """

    root: Path
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)  # generations that CURRENT names, newest first
    _held: list[set[str]] = field(default_factory=list)  # objects of each of them

    def load(self) -> bool:
        """Take the newest sound generation; False if none was ever published.

        Every file that it names is read and its SHA-256 compared.  Lines of the log behind it are
        cut off.  Raises Corrupt if no generation is sound.
        """
        current, reasons = self.root / FOLDER / CURRENT, []
        if not current.is_file():
            return False
        for digest in current.read_text("ascii", "replace").split()[:2]:
            try:
                return self._take(digest)
            except (OSError, ValueError) as error:
                reasons.append(" ".join(str(error).splitlines()[1:2]) or str(error))
        where = "; ".join(reasons) or f"{current}: it names no generation"
        instead = f"remove {self.root} and start again"
        raise Corrupt(f"the state of an unfinished run is damaged\n{where}\n{instead}")

    def put(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write an object; it counts from the next `publish` on."""
        digest = self._store(chunks)
        self.files[name] = (f"{FOLDER}/{digest}", digest)

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as an object."""
        self.put(name, tensor_chunks(tensors))

    def adopt(self, name: str, path: Path, digest: str) -> None:
        """Count a file of the run, written elsewhere, as part of the state."""
        self.files[name] = (path.relative_to(self.root).as_posix(), digest)

    def drop(self, keep: Callable[[str], bool]) -> None:
        """Forget the files whose names are not to be kept."""
        self.files = {name: entry for name, entry in self.files.items() if keep(name)}

    def path(self, name: str) -> Path | None:
        """Where the file of this name is, if there is one."""
        return self.root / self.files[name][0] if name in self.files else None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What `put_tensors` wrote."""
        with safe_open(self.root / self.files[name][0], framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)

    def publish(self) -> None:
        """Make values, files and the log as they are now what a later `load` will find."""
        size, digest = _log(self.root / LOG)
        data = {"version": VERSION, "values": self.values, "files": self.files}
        made = self._store([to_json({**data, "log": [size, digest]})])
        if self.heads[:1] != [made]:  # else nothing has changed, and the older one stays
            self.heads = [made, *self.heads[:1]]
            self._held = [{made, *(entry[1] for entry in self.files.values())}, *self._held[:1]]
        folder = self.root / FOLDER
        publish(folder / CURRENT, ["\n".join(self.heads).encode("ascii")])
        used = {CURRENT}.union(*self._held)
        for file in folder.iterdir():
            if file.name not in used:
                file.unlink()

    def _store(self, chunks: Iterable[bytes | memoryview]) -> str:
        folder = self.root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        digest = publish(folder / "incoming", chunks)
        (folder / "incoming").replace(folder / digest)
        sync(folder)
        return digest

    def _take(self, digest: str) -> bool:
        """Take one generation.  Raises Corrupt or OSError, and then nothing has changed."""
        path = f"{FOLDER}/{digest}"
        data = read_json(self._sound(path, digest))
        kinds = {"version": int, "values": dict, "files": dict, "log": list}
        closed(self.root / path, data, kinds)
        if data["version"] != VERSION:
            corrupt("another version of the state", f"{path}: version {data['version']}")
        files = {name: (str(entry[0]), str(entry[1])) for name, entry in data["files"].items()}
        for entry in files.values():
            self._sound(*entry)
        size, wanted = data["log"]
        if _log(self.root / LOG, size) != (size, wanted):
            corrupt("the log was changed", f"{self.root / LOG}: not the first {size:,} bytes kept")
        if (self.root / LOG).exists():
            os.truncate(self.root / LOG, size)
        self.values, self.files = data["values"], files
        self.heads, self._held = [digest], [{digest, *(entry[1] for entry in files.values())}]
        return True

    def _sound(self, path: str, digest: str) -> Path:
        """The file below root, read and compared."""
        file = self.root / path
        if not file.resolve().is_relative_to(self.root.resolve()):
            corrupt("a file outside the run", str(file))
        found = hash_file(file)
        if found != digest:
            where = f"{file}: SHA-256 {found[:16]}..., {digest[:16]}... expected"
            corrupt("a file of an unfinished run was changed", where)
        return file


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _log(path: Path, size: int | None = None) -> tuple[int, str]:
    """(bytes, SHA-256) of the first `size` bytes of a log, safely on the disk; of all if None."""
    if not path.exists():
        return 0, hashlib.sha256().hexdigest()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        data = file.read() if size is None else file.read(size)
    return len(data), hashlib.sha256(data).hexdigest()
