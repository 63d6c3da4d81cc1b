"""What a checkpoint will be, file by file, from the skeleton and the plan alone.

The writer works from the same outline, so predicted bytes and real bytes are equal.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import aptq
from aptq.core.parts import Spec, part_specs
from aptq.core.plan import Plan, Shapes, Target
from aptq.model.model import Model
from aptq.model.normalise import normalise
from aptq.model.trace import signature
from aptq.store.headers import file_size, nbytes, spec_of
from aptq.store.manifest import FORMAT, NAME, NO_HASH, VERSION, Manifest

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Outline:
    """Every file of a checkpoint: tensors of the shards, content of the small files.

    shards: the blocks in order, then one with everything outside them.
    """

    shards: dict[str, dict[str, Spec]]
    texts: dict[str, bytes]
    manifest: Manifest  # hashes are zeros until the files are written

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name."""
        sizes = {name: file_size(specs) for name, specs in self.shards.items()}
        sizes |= {name: len(text) for name, text in self.texts.items()}
        return {**sizes, NAME: len(self.manifest.to_bytes())}


@dataclass(frozen=True, slots=True)
class Predicted:
    """Exact sizes before a run."""

    files: dict[str, int]  # bytes by file name
    total: int  # their sum: what a byte budget limits
    linear_bytes: int  # of the linears inside the blocks, kept ones included
    bits: float  # linear_bytes in bits for each weight


def predict(model: Model, plan: Plan) -> Predicted:
    """Sizes of the checkpoint that `plan` makes of `model`; reads no weights.

    Raises ValueError if the plan speaks of other layers than the model has.
    """
    files = outline(model, plan).sizes()
    itemsize = model.dtype.itemsize
    inside = model.shapes, itemsize, model.outer_shapes
    return Predicted(files, sum(files.values()), plan.nbytes(*inside), plan.bits(*inside))


def outline(model: Model, plan: Plan) -> Outline:
    """All files of the checkpoint.  Raises ValueError as predict does."""
    model.check(plan)
    dtypes = _Dtypes(model)
    tensors = _blocks(model, plan, dtypes)
    skeleton = model.skeleton.state_dict()
    kept = {name: dtypes.of(name, spec_of(skeleton[name])) for name in model.outer_names()}
    tensors.append(_packed(kept, plan.targets, model.outer_shapes))
    shapes, count = {**model.shapes, **model.outer_shapes}, len(tensors)
    shards = {f"model-{i:05d}-of-{count:05d}.safetensors": t for i, t in enumerate(tensors, 1)}
    texts = {"config.json": _config(model, plan), INDEX: _index(shards)}
    texts |= {path.name: path.read_bytes() for path in model.files()}
    manifest = Manifest(
        package=aptq.__version__,
        source=Path(model.source).name if model.source.count("/") > 1 else model.source,
        model_type=model.config.model_type,
        dtype=_name(model.dtype),
        tied=bool(model.tied),
        plan=plan,
        shapes={name: shapes[name] for name in plan.targets},
        outer=tuple(name for name in plan.targets if name in model.outer_shapes),
        files=dict.fromkeys([*shards, *texts], NO_HASH),
    )
    return Outline(shards, texts, manifest)


class _Dtypes:
    """In which dtype a tensor is loaded: the model's, or float32 where transformers insists."""

    def __init__(self, model: Model) -> None:
        special = model.skeleton._get_dtype_plan(model.dtype)
        self.special = [(re.compile(k.replace("*", ".*")), dtype) for k, dtype in special.items()]

    def of(self, name: str, spec: Spec) -> Spec:
        """`spec` of the skeleton as it will be loaded."""
        for pattern, dtype in self.special:
            if pattern.search(name):
                return dtype, spec[1]
        return spec


def _blocks(model: Model, plan: Plan, dtypes: _Dtypes) -> list[dict[str, Spec]]:
    """Tensors of every block; blocks of equal structure are normalised once."""
    known: dict[object, dict[str, Spec]] = {}
    blocks = []
    for index in range(model.blocks):
        name = model.block_name(index)
        block = model.skeleton.get_submodule(name)
        key = signature(block)
        if key not in known:
            empty = copy.deepcopy(block)
            normalise(empty, model.arch.joined, model.config, name)
            known[key] = {path: spec_of(t) for path, t in empty.state_dict().items()}
        kept = {f"{name}.{path}": spec for path, spec in known[key].items()}
        kept = {path: dtypes.of(path, spec) for path, spec in kept.items()}
        blocks.append(_packed(kept, plan.targets, model.shapes))
    return blocks


def _packed(
    kept: Mapping[str, Spec], targets: Mapping[str, Target], shapes: Shapes
) -> dict[str, Spec]:
    """Some tensors with the weight of every planned layer replaced by its parts."""
    specs: dict[str, Spec] = {}
    for path, spec in kept.items():
        layer = path.removesuffix(".weight")
        target = targets.get(layer) if path != layer else None
        if target is None or target.kept:
            specs[path] = spec
        else:
            specs |= layer_specs(layer, target, shapes[layer])
    return specs


def layer_specs(layer: str, target: Target, shape: tuple[int, int]) -> dict[str, Spec]:
    """The stored tensors of one compressed layer by full name."""
    return {
        f"{layer}.parts.{number}.{name}": spec
        for number, part in enumerate(target.parts)
        for name, spec in part_specs(part, shape).items()
    }


def quantization(plan: Plan) -> dict[str, object]:
    """quantization_config of config.json: all that transformers needs besides the tensors."""
    return {"quant_method": FORMAT, "version": VERSION, "plan": plan.to_json()}


def _config(model: Model, plan: Plan) -> bytes:
    """config.json: the model's own, with what is needed to load it packed."""
    data = json.loads(model.config.to_json_string(use_diff=True))
    data["architectures"] = [type(model.skeleton).__name__]
    data["dtype"] = _name(model.dtype)
    data["quantization_config"] = quantization(plan)
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _index(shards: Mapping[str, Mapping[str, Spec]]) -> bytes:
    where = {name: shard for shard, specs in shards.items() for name in specs}
    total = sum(nbytes(spec) for specs in shards.values() for spec in specs.values())
    data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(data, indent=2) + "\n").encode()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
