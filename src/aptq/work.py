"""What the steps of one call share, and what they tell whoever waits for them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from aptq.core.profile import Profiles
from aptq.engine.data import Batches
from aptq.engine.stream import Where
from aptq.engine.walk import Progress
from aptq.model.model import Model


class Step(NamedTuple):
    """`done` of `total` units of `phase`."""

    phase: str
    done: int
    total: int


Report = Callable[[Step | str], None]  # progress, or a line that a person should see


def silent(event: Step | str) -> None:
    """Tell nobody."""


@dataclass
class Work:
    """The model, what it is calibrated on, and how the work is to be done."""

    model: Model
    batches: Batches | None  # None if nothing looks at data
    device: torch.device
    activations: Where = "auto"
    strict: bool = False
    report: Report = silent
    profiles: Profiles | None = None
    walked: Counter[str] = field(default_factory=Counter)  # blocks that each phase has done

    def show(self, phase: str, done: Progress) -> None:
        """Tell how many blocks of a walk are done, in whatever order they come."""
        self.report(Step(phase, self.walked[phase] % done.blocks + 1, done.blocks))
        self.walked[phase] += 1
