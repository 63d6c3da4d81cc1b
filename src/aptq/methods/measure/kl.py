"""kl: measured KL(original || changed) of the next tokens with one layer changed, nats per token.

around = "float": all others as they are (MixDQ, ModelOpt's kl_div); "plan": all others at one
candidate, and the loss is the KL less that with this layer alone at full precision, so that losses
add up as they do at low bits (ExLlamaV3 measures so).  The whole model has to be in memory; only
the blocks from the changed one on run again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aptq.core.plan import Target
from aptq.core.scores import Scores
from aptq.engine.block import Block
from aptq.engine.judge import compare, reference
from aptq.engine.layer import Layer
from aptq.engine.measure import Findings, Measure, Subject
from aptq.engine.stage import methods
from aptq.engine.stream import Stream, free_bytes
from aptq.engine.tail import PIECE
from aptq.engine.walk import walk
from aptq.failures import Shortage
from aptq.registry import closest


@methods.register("kl")
@dataclass(frozen=True, kw_only=True)
class KL(Measure):
    """The loss itself, one layer at a time; the errors are calibrated on all windows."""

    unit: ClassVar[Literal["nats", "relative"]] = "nats"

    around: Literal["float", "plan"] = "float"  # what the other layers are
    base: str = ""  # their grid around a plan; "" = the candidate in the middle by size
    windows: int = 8  # first windows that the divergence is measured on

    def tabulate(self, subject: Subject) -> Scores:
        """Layers times candidates evaluations, each of half the model on average."""
        base, model = self._base(subject), subject.model
        seen = replace(subject, ids=subject.ids[: self.windows])
        _check_room(subject, seen)
        wanted, found = reference(seen), Findings()
        blocks = _compressed(subject, base) if self.around == "plan" else _loaded(subject)
        stream, resident = subject.stream(), Resident(seen, blocks, seen.stream("changed"), wanted)
        model.load_outer(subject.device)
        for index, module in enumerate(blocks):
            block = subject.block(index, stream)
            model.unload(index)  # the block stays ours
            for group in block.groups:
                layers = block.open_layers(group)
                if layers:
                    block.collect(subject.needs(), group)
                for layer in layers:
                    changes = subject.errors(layer)
                    found.add(layer, resident.score(block, layer, changes, self.around == "plan"))
                    layer.stats.clear()
            stream.advance(index, module)
            resident.stream.advance(index, module)
        model.unload_outer()
        for used in (wanted, stream, resident.stream):
            used.close()
        return self.scores(seen, found)

    def _base(self, subject: Subject) -> Target:
        texts = {str(target): target for target in subject.targets}
        if self.base and self.base not in texts:
            raise ValueError(
                f"kl: base = {self.base!r} is no candidate\n"
                f"the candidates are {', '.join(texts)}\n{closest(self.base, tuple(texts))}"
            )
        return texts[self.base] if self.base else subject.middle()


@dataclass(frozen=True)
class Resident:
    """All blocks in memory, and the states that enter the first that may have changed."""

    seen: Subject  # with the windows that are measured on
    blocks: list[nn.Module]
    stream: Stream
    wanted: Stream  # the original's last hidden states

    def score(
        self, block: Block, layer: Layer, changes: Iterable[Tensor], relative: bool
    ) -> Tensor:
        """Sums of the divergence with each change of the layer, [2 halves, changes].

        relative: less that with the layer as it was in the original, in blocks that are not.
        """
        linear = self.blocks[block.index].get_submodule(layer.name.removeprefix(block.name + "."))
        assert isinstance(linear, nn.Linear), type(linear)
        held, dtype, found = linear.weight.data, linear.weight.dtype, []
        linear.weight.data = layer.weight.to(dtype)
        without = self.loss(block.index) if relative else torch.zeros(2, dtype=torch.float64)
        for change in changes:
            linear.weight.data = (layer.weight + change).to(dtype)
            same = not change.any()
            found.append(torch.zeros_like(without) if same else self.loss(block.index) - without)
        linear.weight.data = held
        return torch.stack(found, dim=1)

    @torch.inference_mode()
    def loss(self, index: int) -> Tensor:
        """Sums of the divergence over the tokens of each half [2]; blocks from `index` on run."""
        total = torch.zeros(2, dtype=torch.float64)
        for windows, call in self.stream.inputs(index):
            got = call.run(self.blocks[index])
            for later in range(index + 1, len(self.blocks)):
                got = self.stream.calls[later][len(got)].at(got).run(self.blocks[later])
            ids, wanted = self.seen.ids[windows], self.wanted.hidden[windows]
            total += compare(self.seen.model, wanted, got, ids, windows.start)
        return total


def _loaded(subject: Subject) -> list[nn.Module]:
    """All blocks as they are; the model itself stays empty."""
    blocks = []
    for index in range(subject.model.blocks):
        blocks.append(subject.model.load(index, subject.device))
        subject.model.unload(index)
    return blocks


def _compressed(subject: Subject, base: Target) -> list[nn.Module]:
    """All blocks with every layer to score at `base`."""
    blocks: list[nn.Module] = []
    stream = subject.stream()
    walk(
        subject.model,
        stream,
        subject.stages,
        subject.plan(base),
        sink=lambda block: blocks.append(block.module),
        profiles=subject.profiles,
    )
    stream.close()
    return blocks


def _check_room(subject: Subject, seen: Subject) -> None:
    """Raise Shortage unless the whole model fits with a block in float32 and the windows."""
    model, free = subject.model, free_bytes(subject.device)
    weights = model.coverage.total * model.dtype.itemsize
    width = model.config.get_text_config().hidden_size
    work = 8 * model.coverage.grouped // model.blocks + PIECE
    states = 4 * seen.ids.numel() * width * model.dtype.itemsize
    if weights + work + states > free:
        raise Shortage(
            "measure kl needs the whole model in memory\n"
            f"{subject.device.type}: {weights:,} bytes of weights, {work + states:,} for the work, "
            f"{free:,} free\nmeasure with fisher, which holds one block, or use a larger device"
        )
