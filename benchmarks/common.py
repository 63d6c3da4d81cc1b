"""What every benchmark shares: where data lies, what machine this is, and growing result files.

A result file is {name, date, device, versions, commit, protocol, rows}.  Its rows come from one
device and one set of versions; a finished row is never measured again, so a run can be cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers")
IDENTITY = ("label", "model_sha256", "recipe_sha256", "seed", "windows", "calibration")

Row = dict[str, Any]


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_model(folder: Path) -> str:
    """Digest of a folder's weights: of its only safetensors file, or of several files' digests."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder} holds no .safetensors file; give a Hugging Face folder")
    digests = [sha256_file(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def commit() -> str:
    """The checked-out commit, with "-dirty" behind it when the package differs from it.

    A copy of the tree without its history may carry the commit in a file COMMIT.
    """
    note = REPOSITORY / "COMMIT"
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()

    def git(*words: str) -> str:
        call = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if not head or " " in head:
        return "none"
    return head + ("-dirty" if git("status", "--porcelain", "--", "src") else "")


def versions() -> dict[str, str]:
    import aptq

    found = {"python": platform.python_version(), "aptq": aptq.__version__}
    return found | {name: version(name) for name in PACKAGES}


def device_name(device: str) -> str:
    """The model of the GPU, or of the processor with its number of usable cores."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({len(os.sched_getaffinity(0))} cores)"


def peak_bytes(device: str) -> int:
    """Peak of this process so far: GPU memory allocated, or resident set (file pages too)."""
    import resource

    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tell_stale(stale: list[str], check: bool) -> None:
    """Print what was out of date: with `check` it still is, and the exit status says so."""
    if stale:
        print(("out of date: " if check else "rewritten: ") + ", ".join(stale))
    if stale and check:
        raise SystemExit(1)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Results:
    """One result file.  `open` refuses to mix devices or versions, before anything is measured."""

    path: Path
    head: dict[str, Any]
    rows: list[Row]

    @classmethod
    def open(cls, name: str, *, device: str, protocol: str, folder: Path = RESULTS) -> Results:
        head = {"name": name, "date": now(), "device": device_name(device), "versions": versions()}
        head |= {"commit": commit(), "protocol": protocol}
        path = folder / f"{name}.json"
        if not path.exists():
            return cls(path, head, [])
        old = json.loads(path.read_text(encoding="utf-8"))
        for key in ("device", "versions", "protocol"):
            if old[key] != head[key]:
                raise SystemExit(
                    f"{path} holds rows of another {key}\n"
                    f"there {old[key]!r}, here {head[key]!r}\n"
                    "give another --name, or remove the file to measure everything again"
                )
        return cls(path, head, old["rows"])

    def find(self, row: Row) -> Row | None:
        """The finished row with the identity of `row`, if there is one."""
        wanted = [row.get(key) for key in IDENTITY]
        return next((r for r in self.rows if [r.get(key) for key in IDENTITY] == wanted), None)

    def append(self, row: Row) -> None:
        """Add a row (with its own date and commit) and replace the file in one step.

        Rows of other processes that write to the same file at the same time are kept.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                self.rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
            self.rows.append(row | {"date": self.head["date"], "commit": self.head["commit"]})
            partial = self.path.with_suffix(".partial")
            partial.write_text(
                json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n", encoding="utf-8"
            )
            partial.replace(self.path)


def last_json(text: str, words: Sequence[str]) -> dict[str, Any]:
    """The JSON object on the last line of a subprocess's output."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"no report from {' '.join(words)}\nits output ends with: {text[-500:]}")
    return json.loads(lines[-1])
