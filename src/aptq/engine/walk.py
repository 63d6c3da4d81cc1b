"""walk: the one loop over blocks.  It knows no method: it loads, lets stages work, and saves."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    phase: str = ""  # which walk it is, where a step takes several


class Keeper(Protocol):
    """Remembers what a walk has done, for one that goes on after an interruption."""

    def resume(self, line: "Line", make: Callable[[int], Block]) -> int:
        """Bring streams and held blocks to where they were; number of the next block to load."""


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
    profiles: Profiles | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Compress every block, or those that `keeper` does not know yet, few in memory at a time.

    Each stage works on the inputs that the compressed blocks before it produce; `sink` gets the
    finished block, whose layers hold the parts; `profiles` weight the rows of statistics that ask
    for it.  Stages whose window holds several blocks get them when the last of these has been
    through the stages before; a block is finished, by the stages behind them, when no later window
    holds it.  Raises ValueError when a layer ends with other parts than planned.
    """
    early, together, late = _split(stages)
    size, stride = max((stage.window for stage in together), default=(1, 1))
    stream.learn(model, {b for stage in stages for b in stage.batches(len(stream.hidden))})
    original = stream.twin() if any(stage.original for stage in stages) else None
    line = Line(model, stream, original)

    def make(index: int) -> Block:
        module, (own, theirs) = model.load(index, stream.device), line.ends()
        name, groups = model.block_name(index), model.groups(index)
        origin = None if theirs is None else Origin(index, name, module, theirs)
        return Block(index, name, module, groups, plan, own, order, profiles, origin)

    start = 0 if keeper is None else keeper.resume(line, make)
    for index in reported(range(start, model.blocks), model.blocks, report):
        block = make(index)
        for stage in early:
            _run(stages, stage, [block])
        line.held.append(block)
        final = index + 1 == model.blocks
        if len(line.held) < size and not final:
            continue
        line.enter()
        for stage in together:
            _run(stages, stage, line.held)
        for _ in range(len(line.held) if final else stride):
            for stage in late:
                _run(stages, stage, line.held[:1])
            _check_done(line.held[0])
            line.finish(sink)
        del block  # before the next one is loaded
    if original is not None:
        original.close()


def _run(stages: Sequence[Stage], stage: Stage, blocks: Sequence[Block]) -> None:
    """Let one of the stages work, and note what it has left of the weights."""
    stage.on_blocks(blocks)
    if len(stages) > 1:  # of a single one the log of the layers tells the same
        number = next(n for n, one in enumerate(stages) if one is stage)
        for block in blocks:
            block.notes.append({"stage": number, "error": block.error()})


def _split(stages: Sequence[Stage]) -> tuple[Sequence[Stage], Sequence[Stage], Sequence[Stage]]:
    """Stages before those that get several blocks at a time, these, and those behind them."""
    wide = [number for number, stage in enumerate(stages) if stage.window[0] > 1]
    first, last = (wide[0], wide[-1] + 1) if wide else (len(stages), len(stages))
    for stage in stages[first:last]:
        if stage.window[0] == 1:  # blocks would pass it once in every window that holds them
            raise ValueError(
                f"{stage.name} stands between stages that get several blocks at a time\n"
                f"it works on one block, they on {max(s.window[0] for s in stages)}\n"
                "put it in front of or behind them"
            )
    return stages[:first], stages[first:last], stages[last:]


class Line:
    """Blocks that are not finished yet, and the streams that enter the first and the next one."""

    def __init__(self, model: Model, stream: Stream, original: Stream | None) -> None:
        self.model, self.stream, self.original = model, stream, original
        self.held: list[Block] = []
        self.copies: list[Stream] = []

    def ends(self) -> tuple[Stream, Stream | None]:
        """The streams (compressed, original) that enter the next block: copies if any is held."""
        if not self.held:
            return self.stream, self.original
        self.close()  # those that an earlier block has had, where windows hold more than two
        own = self.stream.twin("ahead")
        theirs = None if self.original is None else self.original.twin("original-ahead")
        self.copies = [own] if theirs is None else [own, theirs]
        for block in self.held:
            own.advance(block.index, block.module)
            if theirs is not None and block.origin is not None:
                theirs.advance(block.index, block.origin.module)
        return own, theirs

    def enter(self) -> None:
        """From here on held blocks and their origins see the streams that enter the first."""
        for block in self.held:
            if block.stream is not self.stream:
                block.enter(self.stream)
            if block.origin is not None and self.original is not None:
                block.origin.stream = self.original
        self.close()

    def close(self) -> None:
        """Drop the copies."""
        for stream in self.copies:
            stream.close()
        self.copies = []

    def finish(self, sink: Callable[[Block], None]) -> None:
        """The first held block is done: move the streams behind it and hand it over."""
        block = self.held.pop(0)
        if block.index + 1 < self.model.blocks:
            self.stream.advance(block.index, block.module)
            if block.origin is not None:
                block.origin.advance()
                block.notes.append({"drift": self.stream.drift(block.origin.stream)})
        sink(block)
        self.model.unload(block.index)
        if self.held:
            self.enter()


def _check_done(block: Block) -> None:
    bare = []
    for layer in block.layers.values():
        wanted = [part.kind for part in layer.target.parts]
        if [part.meta()["type"] for part in layer.parts] != wanted:
            bare.append(layer)
    if bare:
        found = "+".join(part.meta()["type"] for part in bare[0].parts) or "nothing"
        raise ValueError(
            f"the recipe leaves {len(bare)} planned layers of block {block.index} unfinished\n"
            f"first: {bare[0].name}, target {bare[0].target}, made: {found}\n"
            "add a stage that quantizes, such as gptq or rtn; factors eora, outliers spqr, ~ slim"
        )
