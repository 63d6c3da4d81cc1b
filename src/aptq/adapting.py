"""adapt: factors for one task's text beside the codes of a finished run, which stay as they are.

EoRA's use (arXiv:2410.21271): one base checkpoint, several small adapters, switched at load.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from aptq.core.parts import LowRank
from aptq.core.plan import PartSpec, Plan, Target
from aptq.engine.block import Block
from aptq.engine.compressed import moved
from aptq.engine.data import Data, check_source, limits_of, tokens
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.engine.stream import Where, open_stream
from aptq.engine.walk import walk
from aptq.model.model import Model
from aptq.recipe import Recipe
from aptq.runtime.adapter import NOTE, TENSORS, VERSION
from aptq.runtime.open import find_device
from aptq.store.checkpoint import Checkpoint
from aptq.store.headers import hash_file, publish, tensor_chunks
from aptq.store.manifest import NAME
from aptq.work import Report, Step, silent


@dataclass(frozen=True, kw_only=True)
class Stored(Stage):
    """Layers get the parts that a checkpoint has, blocks its norms and biases."""

    checkpoint: Checkpoint

    def on_blocks(self, blocks: Sequence[Block]) -> None:
        """Read them."""
        for block in blocks:
            for name, value in block.module.state_dict().items():
                full = f"{block.name}.{name}"
                if full in self.checkpoint.where:
                    value.copy_(self.checkpoint.tensor(full))
        super().on_blocks(blocks)

    def on_layer(self, layer: Layer) -> Layer:
        """The parts, on the layer's device."""
        for part in self.checkpoint.layer(layer.name):
            layer.add(moved(part, layer.weight.device))
        return layer


def adapt(
    run: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    rank: int = 32,
    grid: str = "",
    data: Data | None = None,
    first: float = 0.03125,
    device: str = "auto",
    activations: Where = "auto",
    revision: str | None = None,
    report: Report = silent,
) -> Path:
    """Write an adapter for the run or checkpoint `run` of the model `source` to the folder `out`.

    data: text of the task; rank: of the factors of every layer, at most a layer's smaller side;
    grid: of the factors, 16 bits without; first: weight of a window's first token, as in `gptq`.
    Raises ValueError for anything wrong with the inputs, before weights are read.
    """
    target, chosen = Path(out), data or Data()
    if target.exists() or not target.parent.is_dir():
        reason = "it exists" if target.exists() else "there is no such folder"
        raise ValueError(f"no adapter can be made there\n{target}: {reason}\nchoose another --out")
    spec = PartSpec.parse(f"r{rank}@{grid}" if grid else f"r{rank}")
    check_source(chosen)
    checkpoint, on = Checkpoint.open(run), find_device(device)
    model = Model.open(source, revision=revision)
    plan = _plan(model, checkpoint, Path(run), spec)
    batches = tokens(chosen, model.tokenizer, limits=limits_of(model.config))
    found: dict[str, Tensor] = {}
    stages = (Stored(checkpoint=checkpoint), methods.get("eora")(first=first))

    def sink(block: Block) -> None:
        for name, layer in block.layers.items():
            (part,) = (x for x in layer.parts if isinstance(x, LowRank))
            found.update({f"{name}.{k}": tensor.cpu() for k, tensor in part.tensors().items()})
        report(Step("adapt", block.index + 1, model.blocks))

    report(Step("adapt", 0, model.blocks))
    with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as scratch:
        ids = batches.text
        stream = open_stream(model, ids, device=on, folder=Path(scratch), where=activations)
        walk(model, stream, stages, plan, sink=sink)
        stream.close()
    layers = {name: str(x.part("lowrank")) for name, x in plan.targets.items() if not x.kept}
    note = {"version": VERSION, "checkpoint": hash_file(checkpoint.folder / NAME), "layers": layers}
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    publish(partial / TENSORS, tensor_chunks(found))
    publish(partial / NOTE, [(json.dumps(note, indent=1) + "\n").encode()])
    partial.rename(target)
    return target


def _plan(model: Model, checkpoint: Checkpoint, run: Path, spec: PartSpec) -> Plan:
    """The checkpoint's plan with factors in every layer that is not kept."""
    inside = {n: x for n, x in checkpoint.plan.targets.items() if n in model.shapes}
    model.check(Plan(inside))
    recipe = run / "recipe.toml"
    folding = [x.name for x in Recipe.load(recipe).stages if x.folds] if recipe.is_file() else []
    taken = [name for name, target in inside.items() if target.rank]
    if folding or taken:
        why = f"{folding[0]} has scaled its weights" if folding else f"{taken[0]} has factors"
        raise ValueError(
            f"no adapter can be added to this run\n{run}: {why}\n"
            "make the run with a recipe without that"
        )
    targets = {}
    for name, target in inside.items():
        size = min(spec.rank, *model.shapes[name])
        own = PartSpec(spec.grid, rank=size)
        targets[name] = target if target.kept else Target((*target.parts, own))
    return Plan(targets)
