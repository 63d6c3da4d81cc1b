"""aptq.json: what a checkpoint folder holds.  Only names, the plan and hashes of fixed width.

So its size is known before the run, and nothing in it is ever used as code, pattern or path.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from aptq.core import reading
from aptq.core.plan import Plan, Shapes
from aptq.failures import Corrupt

NAME = "aptq.json"
FORMAT, VERSION = "aptq", 1
NO_HASH = "0" * 64
_HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"(?!\.)[^/\\:\x00-\x1f]{1,255}")  # a plain name inside the folder
_AGAIN = "copy or download the checkpoint again, or compress the model again"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of aptq.json.  `files`: SHA-256 of every other file of the folder by name."""

    package: str  # version of aptq that wrote it
    source: str  # name of the model, without the path
    model_type: str
    dtype: str  # of kept weights and activations: bfloat16, float16 or float32
    tied: bool  # the head is the embedding
    plan: Plan
    shapes: Shapes  # (out, in) of every layer of the plan
    files: dict[str, str]
    outer: tuple[str, ...] = ()  # those of the layers that lie outside the blocks

    def to_bytes(self) -> bytes:
        """The file; its length depends on no hash."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "package": self.package,
            "source": self.source,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "tied": self.tied,
            "plan": self.plan.to_json(),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            # written only where there are any: other checkpoints stay as they always were
            **({"outer": list(self.outer)} if self.outer else {}),
            "files": self.files,
        }
        return to_json(data)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check aptq.json.  Raises Corrupt for all that is not exactly the schema."""
        path = folder / NAME
        data = read_json(path)
        check_version(path, data.get("format"), data.get("version"))
        kinds: dict[str, type] = dict.fromkeys(("package", "source", "model_type", "dtype"), str)
        kinds |= {"format": str, "version": int, "tied": bool}
        kinds |= dict.fromkeys(("plan", "shapes", "files"), dict)
        kinds |= {"outer": list} if "outer" in data else {}
        closed(path, data, kinds)
        if data["dtype"] not in ("bfloat16", "float16", "float32"):
            corrupt("unknown dtype in a checkpoint", f"{path}: {data['dtype']!r}")
        plan = read_plan(path, data["plan"])
        return cls(
            package=data["package"],
            source=data["source"],
            model_type=data["model_type"],
            dtype=data["dtype"],
            tied=data["tied"],
            plan=plan,
            shapes=_shapes(path, data["shapes"], plan),
            files=_files(path, data["files"]),
            outer=_outer(path, data.get("outer", []), plan),
        )


def to_json(data: Mapping[str, Any]) -> bytes:
    """Deterministic and compact: keys as given, no spaces, ASCII."""
    return (json.dumps(data, separators=(",", ":")) + "\n").encode("ascii")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size.  Raises Corrupt."""
    try:
        data = reading.read_json(path, reading.NAMES)
    except OSError as error:
        corrupt("a file of the checkpoint cannot be read", f"{path}: {error.strerror}")
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        corrupt("a file of the checkpoint is no valid JSON", f"{path}: {reason}")
    if not isinstance(data, dict):
        corrupt("a file of the checkpoint is no JSON object", f"{path}: {type(data).__name__}")
    return data


def check_version(where: Path | str, kind: object, version: object) -> None:
    """Raise Corrupt unless this is a version that this program reads."""
    if kind != FORMAT or type(version) is not int or version < 1:
        corrupt("not an aptq checkpoint", f"{where}: format {kind!r}, version {version!r}")
    if version > VERSION:
        raise Corrupt(
            f"the checkpoint was written by a newer aptq\n{where}: format version {version}, "
            f"this program reads up to {VERSION}\n"
            f"install an aptq that reads format version {version}: pip install -U aptq"
        )


def closed(where: Path | str, data: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise Corrupt unless data has exactly these keys, each of its kind."""
    if unknown := sorted(data.keys() - kinds.keys()):
        corrupt("unknown keys in a checkpoint", f"{where}: {', '.join(unknown[:5])}")
    if missing := sorted(kinds.keys() - data.keys()):
        corrupt("missing keys in a checkpoint", f"{where}: {', '.join(missing)}")
    for key, kind in kinds.items():
        if type(data[key]) is not kind:
            found = type(data[key]).__name__
            corrupt("wrong kind of value in a checkpoint", f"{where}: {key} is a {found}")


def read_plan(where: Path | str, data: object) -> Plan:
    """A plan from its compact form.  Raises Corrupt."""
    try:
        return Plan.from_json(data)
    except ValueError as error:
        corrupt("the plan of a checkpoint is broken", f"{where}: {' '.join(str(error).split())}")


def corrupt(what: str, where: str, instead: str = _AGAIN) -> NoReturn:
    """Raise Corrupt in the usual three lines."""
    raise Corrupt(f"{what}\n{where}\n{instead}")


def _shapes(path: Path, data: dict[str, Any], plan: Plan) -> Shapes:
    if odd := data.keys() ^ plan.targets.keys():
        corrupt("plan and shapes of a checkpoint disagree", f"{path}: {len(odd)}, {min(odd)}")
    for name, shape in data.items():
        numbers = shape if isinstance(shape, list) else []
        if len(numbers) != 2 or any(type(n) is not int or not 0 < n < 1 << 32 for n in numbers):
            corrupt("a layer has an impossible shape", f"{path}: {name} {shape!r}")
    return {name: (shape[0], shape[1]) for name, shape in data.items()}


def _outer(path: Path, names: list[Any], plan: Plan) -> tuple[str, ...]:
    odd = [n for n in names if not isinstance(n, str) or n not in plan.targets]
    if odd or len(set(names)) != len(names):
        corrupt("layers outside the blocks that the plan lacks", f"{path}: {names[:5]!r}")
    return tuple(names)


def _files(path: Path, data: dict[str, Any]) -> dict[str, str]:
    for name, digest in data.items():
        if not _FILE.fullmatch(name) or name == NAME:
            corrupt("a listed file name is not allowed", f"{path}: {name[:100]!r}")
        if not isinstance(digest, str) or not _HASH.fullmatch(digest):
            corrupt("a listed hash is no SHA-256", f"{path}: {name}")
    return dict(data)
