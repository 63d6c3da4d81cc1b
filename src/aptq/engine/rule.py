"""Rule: the base of measures that read no data."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from aptq.core.plan import Target
from aptq.core.scores import Scores
from aptq.engine.candidate import exact
from aptq.engine.measure import Measure, Subject
from aptq.engine.stage import methods


@dataclass(frozen=True, kw_only=True)
class Rule(Measure):
    """Base of controls that know shapes, roles and places only: weights * 4^(worth - bits).

    The squared step of a grid falls by 4 with each bit.
    """

    unit: ClassVar[Literal["nats", "relative"]] = "relative"

    @property
    def compares(self) -> bool:
        """No error is looked at."""
        return False

    def worth(self, role: str, block: int, blocks: int) -> float:
        """Bits that a layer deserves beyond others."""
        return 0.0

    def tabulate(self, subject: Subject) -> Scores:
        """No data is read."""
        model, losses = subject.model, {}
        for index in range(model.blocks):
            for group in model.groups(index):
                for role, name in group.layers.items():
                    scale = math.prod(model.shapes[name]) * 4 ** self.worth(
                        role, index, model.blocks
                    )
                    if name in subject.names:
                        losses[name] = tuple(scale * step(target) for target in subject.targets)
        noise = {name: (0.0,) * len(subject.targets) for name in losses}
        texts = tuple(map(str, subject.targets))
        record = self.record(replace(subject, ids=subject.ids[:0]), {})
        return Scores(methods.name_of(type(self)), self.unit, texts, losses, noise, record=record)


def step(target: Target) -> float:
    """Squared step of a target's grids over the range, 4^-bits; 0 at 16 bits."""
    return 0.0 if exact(target) else 4.0**-target.bits
