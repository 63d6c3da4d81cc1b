"""What the steps of one call share, and what they tell whoever waits for them."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from aptq.core.profile import Profiles
from aptq.engine.data import Batches
from aptq.engine.stream import Where
from aptq.engine.walk import Progress
from aptq.failures import Stopped
from aptq.model.model import Model
from aptq.store.objects import Journal


class Step(NamedTuple):
    """`done` of `total` units of `phase`."""

    phase: str
    done: int
    total: int


Report = Callable[[Step | str], None]  # progress, or a line that a person should see


class Clock:
    """A Report that passes events on and remembers how long each phase took and what it held."""

    def __init__(self, report: Report) -> None:
        self.report, self.at = report, time.perf_counter()
        self.phases: dict[str, dict[str, float]] = {}  # phase -> seconds, peak bytes

    def __call__(self, event: Step | str) -> None:
        """Time up to the end of a unit is that of its phase; up to a beginning, of none."""
        if isinstance(event, Step):
            now = time.perf_counter()
            spent = now - self.at if event.done else 0.0
            self.at = now
            held = self.phases.setdefault(event.phase, {"seconds": 0.0, "memory": 0.0})
            held["seconds"] = round(held["seconds"] + spent, 3)
            held["memory"] = max(held["memory"], psutil.Process().memory_info().rss)
            if torch.cuda.is_initialized():
                held["device"] = torch.cuda.max_memory_allocated()
        self.report(event)


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
    stop: Callable[[], bool] = lambda: False  # has somebody asked to stop?
    journals: tuple[Journal, ...] = ()  # of all runs: what they share is kept in each

    def check_stop(self) -> None:
        """Raise Stopped if somebody has asked for it."""
        if self.stop():
            raise Stopped("stopped\nwhat was finished is kept\ngive the same command to go on")

    def recall(self, name: str) -> Path | None:
        """The file that was kept under a name before the run was interrupted."""
        return self.journals[0].path(name) if self.journals else None

    def remember(self, name: str, data: Mapping[str, Tensor] | bytes) -> None:
        """Keep tensors or text under a name."""
        for journal in self.journals:
            if isinstance(data, bytes):
                journal.put(name, [data])
            else:
                journal.put_tensors(name, data)
            journal.publish()

    def show(self, phase: str, done: Progress) -> None:
        """Tell how many blocks of a walk are done, in whatever order they come."""
        self.report(Step(phase, self.walked[phase] % done.blocks + 1, done.blocks))
        self.walked[phase] += 1
        self.check_stop()
