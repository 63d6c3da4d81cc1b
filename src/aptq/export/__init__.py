"""Exporters: one file each; a finished checkpoint in the format of another engine.

What a format cannot hold is found in shapes and plan alone, before anything is read or written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import Plan, Shapes, Target
from aptq.core.rounding import Scales
from aptq.model.model import Model
from aptq.model.skeleton import safe_config
from aptq.model.sources import Source
from aptq.registry import Registry
from aptq.store.checkpoint import Checkpoint

Report = Callable[[int, int], None]  # blocks written, blocks in all


class Obstacle(NamedTuple):
    """Why a format cannot hold a layer, and what to change in the plan."""

    layer: str
    why: str
    instead: str


@dataclass(frozen=True, kw_only=True)
class Exporter(ABC):
    """Fields are options, as in a stage."""

    @abstractmethod
    def check(self, model: Model, plan: Plan) -> list[Obstacle]:
        """Every layer that the format cannot hold; nothing but names, shapes and grids is read."""

    @abstractmethod
    def write(self, stored: Stored, out: Path, report: Report) -> None:
        """Write the format to the path `out`, which does not exist; `check` found no obstacle."""


exporters: Registry[Exporter] = Registry("aptq.export")


@dataclass(frozen=True)
class Stored:
    """A finished checkpoint and the outline of its model."""

    checkpoint: Checkpoint
    model: Model

    @classmethod
    def open(cls, folder: str | Path) -> Stored:
        """Open a run or checkpoint folder.  Raises ValueError and Corrupt as Checkpoint.open."""
        checkpoint = Checkpoint.open(folder)
        config = safe_config(checkpoint.folder)
        del config.quantization_config
        config.tie_word_embeddings = checkpoint.manifest.tied
        dtype = getattr(torch, checkpoint.manifest.dtype)
        source = Source(checkpoint.manifest.source, checkpoint.folder)
        return cls(checkpoint, Model(source, config, dtype, None, partial=True))

    def part(self, layers: Sequence[str]) -> Quantized:
        """Quantized layers of one grid, their rows one below the other."""
        parts = [self.checkpoint.layer(name)[0] for name in layers]
        found = [part for part in parts if isinstance(part, Quantized)]
        assert len({part.grid for part in found}) == 1, layers
        if len(found) == 1:
            return found[0]
        scales = [part.scales() for part in found]
        zeros = [one.zero for one in scales if one.zero is not None]
        scale, zero = torch.cat([one.scale for one in scales]), torch.cat(zeros) if zeros else None
        codes = torch.cat([part.unpacked() for part in found])
        return Quantized.make(codes, Scales(scale, zero), found[0].grid)

    def weight(self, layers: Sequence[str]) -> Tensor:
        """The weights [out, in] of layers, rows one below the other, in the model's dtype."""
        return torch.cat([self.checkpoint.dense(name, self.model.dtype) for name in layers])


def linears(model: Model) -> dict[str, tuple[str, ...]]:
    """Linears as transformers has them -> the layers of a plan whose rows they hold in this order.

    A layer of a tensor that is no nn.Linear there (transposed, stacked experts) is left out.
    """
    known = {name: module for name, module in model.skeleton.named_modules()}
    found: dict[str, tuple[str, ...]] = {}
    for name in model.shapes:
        parent = name.rpartition(".")[0]
        for path in (name, parent):
            if type(known.get(path)) is nn.Linear:
                found[path] = (*found.get(path, ()), name)
    return found


def grid_of(plan: Plan, layers: Sequence[str]) -> Grid | None:
    """The one grid of layers; bf16 for kept ones, None where they differ or have more parts."""
    targets = [plan.targets[name] for name in layers]
    if any(not target.plain for target in targets):
        return None
    grids = {target.grid or Grid("bf16") for target in targets}
    return grids.pop() if len(grids) == 1 else None


def unlike(target: Target) -> str:
    """Why a target is no single grid."""
    if len(target.parts) > 1:
        kinds = " + ".join(part.kind for part in target.parts)
        return f"it is a sum of {len(target.parts)} parts ({kinds})"
    return f"it is {target}: widths differ between its groups"


def common_obstacles(model: Model, plan: Plan) -> list[Obstacle]:
    """What no format of transformers' own linears can hold."""
    named = linears(model)
    single = {layer for layers in named.values() for layer in layers}
    found = [
        Obstacle(layer, "its tensor is no linear of transformers", "keep this layer")
        for layer, target in plan.targets.items()
        if layer in model.shapes and layer not in single and not target.kept
    ]
    for name, target in plan.targets.items():
        if name in model.outer_shapes and not target.kept:
            found.append(Obstacle(name, "embedding and head stay 16 bit there", "outer = false"))
        elif not target.plain:
            found.append(Obstacle(name, unlike(target), "plan with one grid for each layer"))
    for path, layers in named.items():
        if len(layers) > 1 and grid_of(plan, layers) is None:
            grids = ", ".join(str(plan.targets[layer]) for layer in layers)
            found.append(Obstacle(path, f"one tensor of {grids}", "give its parts the same grid"))
    return found


def columns_obstacle(name: str, shape: tuple[int, int], multiple: int) -> list[Obstacle]:
    """A layer whose rows do not consist of whole groups of `multiple` columns."""
    if shape[1] % multiple == 0:
        return []
    why = f"{shape[1]} columns are no multiple of {multiple}"
    return [Obstacle(name, why, "choose a group size that divides them")]


def shape_of(shapes: Shapes, layers: Sequence[str]) -> tuple[int, int]:
    """(out, in) of layers, rows one below the other."""
    return sum(shapes[name][0] for name in layers), shapes[layers[0]][1]
