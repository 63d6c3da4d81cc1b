"""Measure: what every candidate would do to the model at every layer, as a table of Scores.

The error dW = Q - W of a candidate is made by the recipe's own stages, from the same statistics
that they will compress with; a loss of a plan is the sum of its layers' losses.

Stages that tune blocks leave their trace in it only where every candidate is walked (`tuned`): its
uniform plan through all stages but those for the whole model.  What they do to a layer also makes
up for the errors of others, in its block and before it.  A loss of one layer in the uncompressed
model has no term for that and counts it as damage; norms and biases that moved are not in it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aptq.core.linalg import product
from aptq.core.plan import Plan, Target
from aptq.core.profile import Profiles
from aptq.core.scores import Scores, Table
from aptq.engine.block import Block, Order
from aptq.engine.candidate import errors, exact
from aptq.engine.finished import Finished
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.engine.stat import Stat
from aptq.engine.stream import Stream, Where, open_stream
from aptq.engine.walk import Progress, walk
from aptq.model.model import Model


@dataclass(frozen=True)
class Subject:
    """What is measured, and on what.  Raises ValueError where there is nothing to choose."""

    model: Model
    ids: Tensor  # [windows, length] int64
    device: torch.device
    folder: Path  # for files of intermediate states
    where: Where  # those states: auto, memory or disk
    stages: tuple[Stage, ...]  # the recipe's: they make the errors
    targets: tuple[Target, ...]  # the candidates
    names: frozenset[str]  # layers to score; all others stay as they are
    seed: int = 0
    report: Callable[[Progress], None] | None = None
    profiles: Profiles | None = None  # weights of rows for stages that ask for them
    order: Order = "block"  # of walks with whole plans
    finished: Finished | None = None  # layers of all candidates, where these were walked

    def __post_init__(self) -> None:
        known = self.model.shapes.keys() | self.model.outer_shapes.keys()
        unknown = sorted(self.names - known)
        if unknown or not self.names or all(exact(target) for target in self.targets):
            raise ValueError(
                "there is nothing to measure\n"
                f"{len(self.names)} layers ({len(unknown)} unknown: {', '.join(unknown[:3])}), "
                f"candidates {', '.join(map(str, self.targets)) or 'none'}\n"
                "give layers of the model and a candidate below 16 bits"
            )

    @property
    def outside(self) -> list[str]:
        """Those to score that lie outside the blocks."""
        return [name for name in self.model.outer_shapes if name in self.names]

    def plan(self, target: Target, others: Mapping[str, Target] | None = None) -> Plan:
        """`target` for all layers to score but the `others`; what is not scored is kept."""
        chosen = {name: target if name in self.names else Target() for name in self.model.shapes}
        return Plan({**chosen, **(others or {})}, {"rule": "measured"})

    def ranked(self) -> list[int]:
        """Numbers of the candidates from the smallest to the largest."""
        size, known = self.model.dtype.itemsize, {**self.model.shapes, **self.model.outer_shapes}
        shapes = [known[name] for name in sorted(self.names)]
        costs = [sum(target.nbytes(shape, size) for shape in shapes) for target in self.targets]
        return sorted(range(len(costs)), key=costs.__getitem__)

    def middle(self) -> Target:
        """The candidate in the middle of those below 16 bits, by size."""
        below = [number for number in self.ranked() if not exact(self.targets[number])]
        return self.targets[below[len(below) // 2]]

    def needs(self) -> tuple[Stat, ...]:
        """What the stages want to see: nothing where they have done their work."""
        if self.finished is not None:
            return ()
        return tuple(dict.fromkeys(need for stage in self.stages for need in stage.needs()))

    def errors(self, layer: Layer) -> Iterator[Tensor]:
        """dW of every candidate, of the walks or by `errors`."""
        return errors(layer, self.targets, self.stages, self.finished)

    @contextmanager
    def walked(self) -> Iterator["Subject"]:
        """The subject with all candidates below 16 bits finished, as long as it is open."""
        targets = dict.fromkeys(target for target in self.targets if not exact(target))
        finished = Finished(self.folder)
        try:
            for number, target in enumerate(targets, start=1):
                self._walk(target, finished, f"candidate {number} of {len(targets)}")
            yield replace(self, finished=finished)
        finally:
            finished.close()

    def _walk(self, target: Target, finished: Finished, phase: str) -> None:
        def report(done: Progress) -> None:
            if self.report is not None:
                self.report(replace(done, phase=phase))

        stream, plan, sink = self.stream(), self.plan(target), finished.keep
        model, stages, order, profiles = self.model, self.stages, self.order, self.profiles
        walk(model, stream, stages, plan, order=order, sink=sink, report=report, profiles=profiles)
        stream.close()

    def stream(self, name: str = "hidden") -> Stream:
        """The windows, embedded; `name` is that of the file if they do not fit in memory."""
        return open_stream(
            self.model,
            self.ids,
            device=self.device,
            folder=self.folder,
            where=self.where,
            name=name,
        )

    def block(self, index: int, stream: Stream) -> Block:
        """Block `index`, loaded, with the layers to score open for stages."""
        module = self.model.load(index, self.device)
        open_for_stages = next(target for target in self.targets if not exact(target))
        name, groups = self.model.block_name(index), self.model.groups(index)
        plan = self.plan(open_for_stages)
        return Block(index, name, module, groups, plan, stream, "block", self.profiles)


def row_damage(change: Tensor, hessian: Tensor) -> Tensor:
    """dW_j H dW_j^T of every row j of dW [out, in], H [in, in]; float64 [out]."""
    return (product(change, hessian) * change).sum(dim=1, dtype=torch.float64)


@dataclass
class Findings:
    """The table on its way: per layer [2, candidates] sums over the tokens of each half, or
    [1, candidates] over all of them where halves are not told apart.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    profiles: dict[str, Tensor] = field(default_factory=dict)  # [bins]
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, layer: Layer, sums: Tensor) -> None:
        """File what was found for a layer, with what the stages counted."""
        assert sums.shape[0] in (1, 2), sums.shape
        self.sums[layer.name] = sums.double().cpu()
        for name, value in layer.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + value

    def table(self, subject: Subject) -> tuple[Table, Table]:
        """Losses per token and their standard errors: half the difference of the two halves, the
        windows of even and of odd number; 0 for a single window.
        """
        windows, length = subject.ids.shape
        tokens = torch.tensor([(windows + 1) // 2, windows // 2], dtype=torch.float64) * length
        losses, noise = {}, {}
        known = (*subject.model.shapes, *subject.model.outer_shapes)
        for name in (name for name in known if name in self.sums):
            sums = self.sums[name]
            means = sums / tokens[: len(sums), None].clamp(min=1)
            spread = (means[0] - means[-1]).abs() / 2 * (windows > 1)
            losses[name] = tuple((sums.sum(dim=0) / tokens.sum()).tolist())
            noise[name] = tuple(spread.tolist())
        return losses, noise


@dataclass(frozen=True, kw_only=True)
class Measure(Stage, ABC):
    """Base of all measures.  `unit`: nats per token, or a number that only orders."""

    unit: ClassVar[Literal["nats", "relative"]]
    backward: ClassVar[bool] = False  # does it read output gradients, and so finds profiles?
    outer: ClassVar[bool] = False  # can it score the embedding and the head?

    # errors as stages that tune blocks leave them: a walk with every candidate.  Off, for it takes
    # as long as compressing once for each
    tuned: bool = False

    @property
    def compares(self) -> bool:
        """Do its numbers depend on the candidates' errors?"""
        return True

    def run(self, subject: Subject) -> Scores:
        """Score every layer of the subject at every candidate.  Raises ValueError as `check`."""
        self.check(subject.outside, subject.stages)
        with subject.walked() if self.tuned else nullcontext(subject) as ready:
            return self.tabulate(ready)

    @abstractmethod
    def tabulate(self, subject: Subject) -> Scores:
        """The scores of a subject that was checked and, if `tuned`, walked."""

    def check(self, outside: Sequence[str], stages: Sequence[Stage] = ()) -> None:
        """Raise ValueError where layers `outside` the blocks are asked for and it knows none.

        Also where it is `tuned` and has no use for errors, or stages whose Q - W is none.
        """
        if self.tuned and not self.compares:
            raise ValueError(
                f"measure {methods.name_of(type(self))!r} has no use for tuned = true\n"
                "that walks every candidate for its errors, and this table does not depend on them"
                "\nuse fisher, or set tuned = false"
            )
        folding = [stage.name for stage in stages if stage.folds]
        if self.tuned and folding:
            raise ValueError(
                f"errors behind {folding[0]} cannot be measured with tuned = true\n"
                "it scales weights against what they read: Q - W is no error of the original\n"
                "leave out that stage or its transformation, or set tuned = false"
            )
        if outside and not self.outer:
            raise ValueError(
                f"measure {methods.name_of(type(self))!r} knows layers inside the blocks only\n"
                f"embedding or head are to be scored too: {', '.join(outside)}\n"
                "use fisher, or set outer = false"
            )

    def scores(self, subject: Subject, found: Findings) -> Scores:
        """The table of what was found on the windows of the subject."""
        held = (
            Profiles(subject.ids.shape[1], found.profiles) if found.profiles else subject.profiles
        )
        losses, noise = found.table(subject)
        return Scores(
            methods.name_of(type(self)),
            self.unit,
            tuple(map(str, subject.targets)),
            losses,
            noise,
            window=held.window if held else 0,
            profiles={name: tuple(p.tolist()) for name, p in held.of.items()} if held else {},
            record=self.record(subject, found.counts),
        )

    def record(self, subject: Subject, counts: Mapping[str, float]) -> dict[str, str]:
        """Where the numbers come from."""
        return {
            "source": subject.model.source,
            "options": repr(self),
            "stages": ", ".join(map(repr, subject.stages)),
            "windows": " x ".join(map(str, subject.ids.shape)),
            "seed": str(subject.seed),
            "device": subject.device.type,
            "counts": ", ".join(f"{name} {value:g}" for name, value in sorted(counts.items())),
        }
