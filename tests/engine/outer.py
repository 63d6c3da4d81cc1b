"""A whole run with planned outer layers on a tiny model, as a pipeline does it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.plan import Plan, Target
from aptq.engine.block import Block
from aptq.engine.outer import Outer
from aptq.engine.stage import Stage
from aptq.engine.stream import Stream, open_stream
from aptq.engine.walk import walk
from aptq.model.model import Model
from aptq.store.checkpoint import Writer
from tests.engine.run import CPU, windows


class Run(NamedTuple):
    """The checkpoint folder and what made it."""

    folder: Path
    model: Model
    plan: Plan
    outer: Outer
    stream: Stream


def outer_plan(model: Model, embed: str | None, head: str | None = None) -> Plan:
    """int4 inside the blocks, and what is asked for outside."""
    inside = Plan.uniform(model.shapes, Grid.parse("int4-g16-z"))
    wanted = {model.arch.embed: embed, model.arch.head: head}
    more = {name: Target.parse(text) for name, text in wanted.items() if text is not None}
    return Plan({**inside.targets, **more})


def compressed(
    source: Path,
    out: Path,
    stages: Sequence[Stage],
    embed: str | None,
    head: str | None = None,
    ids: Tensor | None = None,
) -> Run:
    """Compress `source` into the checkpoint `out`."""
    model = Model.open(source)
    plan = outer_plan(model, embed, head)
    ids = windows() if ids is None else ids
    writer = Writer(out, model, plan)
    outer = Outer(model, plan, stages, torch.device("cpu"))
    outer.compress_embedding(ids, folder=out.parent)
    stream = open_stream(model, ids, device=CPU, folder=out.parent)

    def sink(block: Block) -> None:
        writer.write_block(block.index, block.stored())
        outer.compress_head(block)

    walk(model, stream, stages, plan, sink=sink)
    writer.finish(outer.tensors())
    return Run(out, model, plan, outer, stream)
