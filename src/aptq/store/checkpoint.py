"""Write a checkpoint shard by shard, and read one back without trusting it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from aptq.core.parts import Dense, Part, Spec, load_part
from aptq.core.plan import Plan, Target
from aptq.core.reading import strays
from aptq.model.model import Model
from aptq.store.headers import hash_file, misfit, publish, read_specs, spec_of, tensor_chunks
from aptq.store.manifest import NAME, Manifest, corrupt, read_json
from aptq.store.predict import INDEX, Predicted, layer_specs, outline, predict, quantization

__all__ = ["Checkpoint", "Predicted", "Writer", "find", "predict"]


class Writer:
    """Writes the checkpoint of `model` under `plan` into the folder `folder`.

    Each file appears complete or not at all, aptq.json last, so a folder without it is no
    checkpoint.  Raises ValueError for a plan of other layers.
    """

    def __init__(self, folder: Path, model: Model, plan: Plan) -> None:
        self.folder, self.model = folder, model
        self.outline = outline(model, plan)
        self.hashes: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> Path:
        """Publish the shard of block `index`: everything of the block by full name; its path."""
        return self._write(index, tensors)

    def write_outer(self, tensors: Mapping[str, Tensor]) -> None:
        """Publish what lies outside the blocks; tied tensors once, as Model.outer_names() says."""
        self._write(self.model.blocks, tensors)

    def finish(self, packed: Mapping[str, Tensor] | None = None) -> None:
        """Publish the outer tensors (if write_outer did not), the small files and aptq.json.

        packed: by full name the tensors of the parts of planned layers outside the blocks.
        """
        (last, expected), packed = list(self.outline.shards.items())[-1], dict(packed or {})
        if last not in self.hashes:
            self.model.load_outer()
            loaded = self.model.skeleton.state_dict()
            kept = {n: loaded[n] for n in self.model.outer_names() if n in expected}
            self.write_outer(kept | packed)
            self.model.unload_outer()
        missing = self.outline.shards.keys() - self.hashes.keys()
        assert not missing, f"blocks never written: {sorted(missing)}"
        for name, text in self.outline.texts.items():
            self.hashes[name] = publish(self.folder / name, [text])
        manifest = self.outline.manifest
        manifest.files.update(self.hashes)
        publish(self.folder / NAME, [manifest.to_bytes()])

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> Path:
        name, expected = list(self.outline.shards.items())[number]
        found = {path: spec_of(tensor) for path, tensor in tensors.items()}
        wrong = [
            path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path)
        ]
        assert not wrong, f"{len(wrong)} tensors differ: " + "; ".join(
            f"{path} {found.get(path)} planned {expected.get(path)}" for path in sorted(wrong)[:5]
        )
        self.hashes[name] = publish(self.folder / name, tensor_chunks(tensors))
        return self.folder / name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint folder.  `specs`: every stored tensor; `where`: the file it is in."""

    folder: Path
    manifest: Manifest
    specs: dict[str, Spec]
    where: dict[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Open a checkpoint, or a run folder with one, and check all but the hashes.

        Raises ValueError if there is none, Corrupt if files are missing, cut off, of a newer
        version, or disagree with the plan or with each other.
        """
        path = find(folder)
        manifest = Manifest.read(path)
        for name in manifest.files:
            if not (path / name).is_file():
                corrupt("a file of the checkpoint is missing", str(path / name))
        if out := strays(path, [path / NAME, *(path / name for name in manifest.files)]):
            shown = f"{out[0]}: a link to {out[0].resolve()}"
            corrupt("a file of the checkpoint leads out of its folder", shown)
        _check_config(path, manifest)
        specs: dict[str, Spec] = {}
        where: dict[str, str] = {}
        for name in manifest.files:
            if name.endswith(".safetensors"):
                found = read_specs(path / name)
                specs |= found
                where |= dict.fromkeys(found, name)
        _check_index(path, where)
        _check_layers(path, manifest, specs)
        return cls(path, manifest, specs, where)

    @property
    def plan(self) -> Plan:
        """Which layer has which grid."""
        return self.manifest.plan

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in (*self.manifest.files, NAME))

    def verify(self) -> None:
        """Read every file and compare its SHA-256.  Raises Corrupt."""
        for name, expected in self.manifest.files.items():
            found = hash_file(self.folder / name)
            if found != expected:
                where = f"{self.folder / name}: SHA-256 {found[:16]}..., {expected[:16]}... listed"
                corrupt("a file of the checkpoint was changed", where)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor by full name."""
        if name not in self.where:
            corrupt("a tensor is missing from the checkpoint", f"{self.folder}: {name}")
        with safe_open(self.folder / self.where[name], framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def layer(self, name: str) -> list[Part]:
        """The parts of a linear of the plan; a kept one is a single dense part."""
        assert name in self.plan.targets, name
        target, shape = self.plan.targets[name], self.manifest.shapes[name]
        if target.kept:
            return [Dense(self.tensor(f"{name}.weight"))]
        return layer_parts(name, target, shape, self.tensor)

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] of a linear of the plan: the sum of its parts."""
        first, *others = (part.dense() for part in self.layer(name))
        return sum(others, start=first).to(dtype)


def layer_parts(
    name: str, target: Target, shape: tuple[int, int], read: Callable[[str], Tensor]
) -> list[Part]:
    """The parts of a layer from its stored tensors, which `read` gives by full name."""
    parts = []
    for number, spec in enumerate(target.parts):

        def stored(entry: str, prefix: str = f"{name}.parts.{number}.") -> Tensor:
            return read(prefix + entry)

        parts.append(load_part(spec, shape, stored))
    return parts


def find(folder: str | Path) -> Path:
    """The checkpoint: `folder` itself, or checkpoint/ of a run folder.  Raises ValueError."""
    path = Path(folder)
    for place in (path, path / "checkpoint"):
        if (place / NAME).is_file():
            return place
    raise ValueError(
        f"no checkpoint here\n{path}: no {NAME}, and no checkpoint/{NAME}\n"
        "give a run folder or a checkpoint folder that `aptq compress` has finished"
    )


def _check_config(path: Path, manifest: Manifest) -> None:
    found = read_json(path / "config.json").get("quantization_config")
    if found != quantization(manifest.plan):
        where = f"{path}: its quantization_config and {NAME} hold different plans or versions"
        corrupt("config.json does not belong to this checkpoint", where)


def _check_index(path: Path, where: Mapping[str, str]) -> None:
    listed = read_json(path / INDEX).get("weight_map")
    if listed == where:
        return
    claims = listed if isinstance(listed, dict) else {}
    odd = [n for n in claims.keys() | where.keys() if claims.get(n) != where.get(n)]
    shown = (
        f"{path / INDEX}: {len(odd)} disagreements, first {', '.join(sorted(map(str, odd))[:5])}"
    )
    corrupt("the index and the weight files disagree", shown)


def _check_layers(path: Path, manifest: Manifest, specs: Mapping[str, Spec]) -> None:
    """Every layer of the plan is there in full, and nothing else has parts."""
    expected: dict[str, Spec] = {}
    for name, target in manifest.plan.targets.items():
        shape = manifest.shapes[name]
        if target.kept:
            found = specs.get(f"{name}.weight")
            if found is None or found[1] != shape:
                corrupt("a kept layer is missing or misshapen", f"{path}: {name} {found}")
        expected |= layer_specs(name, target, shape)
    parts = {name: spec for name, spec in specs.items() if ".parts." in name}
    if odd := sorted(parts.keys() ^ expected.keys()):
        shown = f"{path}: {len(odd)} tensors, first {', '.join(odd[:5])}"
        corrupt("tensors of the planned layers are missing or unknown", shown)
    for name, spec in parts.items():
        if spec != expected[name]:
            misfit(path, name, spec, expected[name])
