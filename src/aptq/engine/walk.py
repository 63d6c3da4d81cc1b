"""walk: the one loop over blocks.  It knows no method: it loads, lets stages work, and saves."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from aptq.core.plan import Plan
from aptq.core.profile import Profiles
from aptq.engine.block import Block, Order
from aptq.engine.heap import trim_heap
from aptq.engine.origin import Origin
from aptq.engine.stage import Stage
from aptq.engine.stream import Stream
from aptq.model.model import Model


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent after every block."""

    block: int
    blocks: int
    seconds: float  # of this block


def reported(
    indices: Iterable[int], blocks: int, report: Callable[[Progress], None] | None
) -> Iterator[int]:
    """Numbers of blocks; after the work on each one free memory is given back and `report` told."""
    for index in indices:
        began = time.perf_counter()
        yield index
        trim_heap()
        if report is not None:
            report(Progress(index, blocks, time.perf_counter() - began))


def walk(
    model: Model,
    stream: Stream,
    stages: Sequence[Stage],
    plan: Plan,
    *,
    order: Order = "block",
    sink: Callable[[Block], None],
    report: Callable[[Progress], None] | None = None,
    start: int = 0,
    profiles: Profiles | None = None,
) -> None:
    """Compress every block from `start` on, one in memory at a time.

    Each stage works on the inputs that the compressed blocks before it produce; `sink` gets the
    finished block, whose layers hold the parts; `profiles` weight the rows of statistics that ask
    for it.  Raises ValueError when a planned layer ends without parts, for then no stage of the
    recipe quantizes.
    """
    compares = any(need.compares for stage in stages for need in stage.needs())
    original = stream.twin() if compares else None
    for index in reported(range(start, model.blocks), model.blocks, report):
        module = model.load(index, stream.device)
        name, groups = model.block_name(index), model.groups(index)
        origin = None if original is None else Origin(index, name, module, original)
        block = Block(index, name, module, groups, plan, stream, order, profiles, origin)
        for stage in stages:
            stage.on_blocks([block])
        _check_done(block)
        if index + 1 < model.blocks:
            stream.advance(index, module)
            if origin is not None:
                origin.advance()
        sink(block)
        model.unload(index)
        del block, module, origin  # before the next block is loaded
    if original is not None:
        original.close()


def _check_done(block: Block) -> None:
    bare = [name for name, layer in block.layers.items() if not layer.parts]
    if bare:
        raise ValueError(
            f"the recipe leaves {len(bare)} planned layers of block {block.index} uncompressed\n"
            f"first: {bare[0]}, target {block.layers[bare[0]].target}\n"
            "add a stage that quantizes, such as gptq or rtn"
        )
