"""Local: measures that judge the error of one layer by statistics of the block it is in.

The model that they see is the uncompressed one, one block in memory: forward, or backward where
output gradients are asked for.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from aptq.core.scores import Scores
from aptq.engine.backward import Labels, Observed, backward_walk
from aptq.engine.layer import Layer
from aptq.engine.measure import Findings, Measure, Subject
from aptq.engine.outer_fisher import OuterFisher
from aptq.engine.stat import Stat
from aptq.engine.stream import sliced
from aptq.engine.tape import open_tape
from aptq.engine.walk import reported


@dataclass(frozen=True, kw_only=True)
class Local(Measure):
    """`needs` are statistics of its own; `score` finds those and the stages' in `layer.stats`."""

    @property
    def loss(self) -> Labels:
        """Labels of the loss whose gradients it reads, if `backward`."""
        return "sampled"

    @property
    def twice(self) -> bool:
        """Does it look at the data again once the errors are known?"""
        return False

    @abstractmethod
    def score(self, subject: Subject, layer: Layer, changes: Iterator[Tensor]) -> Tensor:
        """Sums over the tokens of each half [2, candidates]; `changes` are the candidates' dW.

        They are made as they are asked for, so that one is in memory at a time.
        """

    def profile(self, layer: Layer) -> Tensor | None:
        """Mean squared output gradient by position [bins], where it is measured."""
        return None

    def watch(self, changes: Sequence[Tensor]) -> Stat:
        """What is shown the data again, if `twice`; `score` then reads it from `layer.stats`."""
        raise NotImplementedError

    def tabulate(self, subject: Subject) -> Scores:
        """One walk over the blocks."""
        found = Findings()
        if self.backward:
            self._backward(subject, found)
        else:
            self._forward(subject, found)
        return self.scores(subject, found)

    def _forward(self, subject: Subject, found: Findings) -> None:
        model, stream = subject.model, subject.stream()
        needs = tuple(dict.fromkeys((*self.needs(), *subject.needs())))
        for index in reported(range(model.blocks), model.blocks, subject.report):
            block = subject.block(index, stream)
            for group in block.groups:
                layers = block.open_layers(group)
                if layers:
                    block.collect(needs, group)
                self._score(subject, layers, found)
            if index + 1 < model.blocks:
                stream.advance(index, block.module)
            model.unload(index)
            del block  # before the next one is loaded
        stream.close()

    def _backward(self, subject: Subject, found: Findings) -> None:
        model, ids = subject.model, subject.ids
        ends = OuterFisher(subject, found) if subject.outside else None
        tape = open_tape(
            model, ids, device=subject.device, folder=subject.folder, where=subject.where
        )

        def visit(block: Observed) -> None:
            layers = [x for x in block.layers.values() if x.name in subject.names]
            if layers:
                self._visit(subject, block, layers, found)

        report, seed = subject.report, subject.seed
        backward_walk(
            model, tape, ids, visit, labels=self.loss, seed=seed, report=report, ends=ends
        )

    def _visit(
        self, subject: Subject, block: Observed, layers: Sequence[Layer], found: Findings
    ) -> None:
        late = [need for need in subject.needs() if need.weighted]
        early = [need for need in subject.needs() if not need.weighted]
        block.observe(tuple(dict.fromkeys((*self.needs(), *early))))
        for layer in block.layers.values():  # of those that are not scored too: others need them
            layer.profile, layer.window = self.profile(layer), subject.ids.shape[1]
            if layer.profile is not None:
                found.profiles[layer.name] = layer.profile.cpu()
        if late:
            block.observe(late, layers)

        def held(layer: Layer) -> int:
            return layer.weight.nbytes * len(subject.targets)

        for some in sliced(layers, held, subject.device) if self.twice else [layers]:
            if self.twice:
                changes = {x.name: list(subject.errors(x)) for x in some}
                block.observe({name: [self.watch(dWs)] for name, dWs in changes.items()}, some)
                del changes
            self._score(subject, some, found)

    def _score(self, subject: Subject, layers: Sequence[Layer], found: Findings) -> None:
        """Score layers that have their statistics, and free these."""
        for layer in layers:
            found.add(layer, self.score(subject, layer, subject.errors(layer)))
        for layer in layers:
            for stat in layer.stats.values():
                stat.forget()
            layer.stats.clear()
