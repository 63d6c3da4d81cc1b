"""A walk over a tiny model, as tests need it: compressed layers by name and the model they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aptq.core.plan import Plan
from aptq.engine.block import Block, Order
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage
from aptq.engine.stream import Stream, Where, open_stream
from aptq.engine.walk import walk
from aptq.model.model import Model

CPU = torch.device("cpu")


def windows(count: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, length), generator=generator)


@dataclass
class Walked:
    """What a walk leaves."""

    layers: dict[str, Layer]
    stored: dict[str, Tensor]
    stream: Stream


def walked(
    model: Model,
    stages: Sequence[Stage],
    plan: Plan,
    folder: Path,
    *,
    ids: Tensor | None = None,
    order: Order = "block",
    where: Where = "memory",
) -> Walked:
    """Run the real walk; keeps every layer with its statistics of the last pass."""
    ids = windows() if ids is None else ids
    stream = open_stream(model, ids, device=CPU, folder=folder, where=where)
    result = Walked({}, {}, stream)

    def sink(block: Block) -> None:
        result.layers.update(block.layers)
        result.stored.update({name: tensor.clone() for name, tensor in block.stored().items()})

    walk(model, stream, stages, plan, order=order, sink=sink)
    return result


def loaded(model: Model) -> nn.ModuleList:
    """All blocks with their original weights."""
    return nn.ModuleList(model.load(index) for index in range(model.blocks))
