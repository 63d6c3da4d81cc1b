"""Compressed: a model whose blocks are finished, for stages that work on all of them at once.

What was compressed is kept in host memory, about as many bytes as the checkpoint will have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aptq.core.parts import PARTS, Part
from aptq.core.plan import Plan
from aptq.core.profile import Profiles
from aptq.engine.block import Block
from aptq.engine.heap import trim_heap
from aptq.engine.stream import Stream, Where, open_stream
from aptq.model.model import Model


class Kept(NamedTuple):
    """One finished block on the CPU."""

    parts: dict[str, list[Part]]  # by full name of the layer
    others: dict[str, Tensor]  # every other tensor of the block's module, by its name there
    counts: dict[str, dict[str, float]]
    records: list[dict[str, Any]]
    notes: list[dict[str, Any]]


@dataclass
class Compressed:
    """All blocks of one run between the walk and the checkpoint."""

    model: Model
    plan: Plan
    ids: Tensor  # [windows, length] int64: the calibration
    written: int  # windows at the end that the original wrote
    device: torch.device
    folder: Path  # for hidden states that do not fit in memory
    where: Where = "auto"
    profiles: Profiles | None = None
    report: Callable[[str, int, int], None] = lambda _phase, _done, _total: None
    blocks: dict[int, Kept] = field(default_factory=dict)

    def keep(self, block: Block) -> None:
        """Take a finished block, still loaded."""
        cpu = torch.device("cpu")
        inside = {f"{name[len(block.name) + 1 :]}.weight" for name in block.layers}
        others = {
            name: tensor.to(cpu, copy=True)
            for name, tensor in block.module.state_dict().items()
            if name not in inside
        }
        parts = {n: [moved(p, cpu) for p in x.parts] for n, x in block.layers.items()}
        counts = {name: layer.counts for name, layer in block.layers.items()}
        self.blocks[block.index] = Kept(parts, others, counts, block.records, block.notes)

    def open(self, index: int, stream: Stream) -> Block:
        """The finished block on the device; to be closed by `Model.unload`."""
        model, kept = self.model, self.blocks[index]
        module = model.load(index, self.device)
        block = Block(
            index,
            model.block_name(index),
            module,
            model.groups(index),
            self.plan,
            stream,
            "block",
            self.profiles,
        )
        for name, layer in block.layers.items():
            layer.parts = [moved(part, self.device) for part in kept.parts[name]]
            layer.counts = kept.counts[name]
            block.linears[name].weight.data = layer.dense().to(block.linears[name].weight.dtype)
        state = module.state_dict(keep_vars=True)
        for name, tensor in kept.others.items():
            state[name].data = tensor.to(self.device)
        block.records, block.notes = kept.records, kept.notes
        return block

    def stream(self, name: str = "hidden") -> Stream:
        """The hidden states that enter block 0."""
        where = {"device": self.device, "folder": self.folder, "where": self.where}
        return open_stream(self.model, self.ids, name=name, **where)  # type: ignore[arg-type]

    def original(self) -> Stream:
        """The last hidden states of the uncompressed model, for all windows; to be closed."""
        stream = self.stream("original")
        for index in range(self.model.blocks):
            stream.advance(index, self.model.load(index, self.device))
            self.model.unload(index)
            trim_heap()
            self.report("original", index + 1, self.model.blocks)
        return stream


def moved(part: Part, device: torch.device) -> Part:
    """The part with its tensors on `device`."""
    tensors = {name: tensor.to(device) for name, tensor in part.tensors().items()}
    return PARTS[part.meta()["type"]].load(tensors, part.meta(), part.shape)
