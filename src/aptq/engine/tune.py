"""tune: the one gradient loop.  It knows no method: it is given parameters and their gradients.

Parameters and optimizer states are float32; what a gradient function computes in 16 bits is its
own affair, there is no autocast.  Nothing waits for the device inside the loop but the checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Optimiser = Literal["adam", "adamw", "sign", "adamw8bit"]
Schedule = Literal["constant", "linear", "cosine"]
FLOOR = 0.05  # of the first rate, where a cosine ends (EfficientQAT's code)
# Adam's guard against a division by zero.  A mean over millions of outputs may have gradients of
# less than 1e-8 for a single weight; torch's own guard of 1e-8 would slow just those down
TINY = 1e-15


class Tunable(Protocol):
    """What is tuned: its parameters, and what it does around the steps."""

    def groups(self) -> list[dict[str, Any]]:
        """torch parameter groups: "params" and "lr", the rate of the first step."""

    def begin(self, turn: int, turns: int) -> None:
        """A turn of the loop begins, with a fresh optimizer."""

    def stepped(self) -> None:
        """A step was taken: bring parameters back to where they may be."""

    def state(self) -> Mapping[str, Tensor]:
        """All that decides the result; the loop copies it."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a copy of `state()`."""


@dataclass(frozen=True)
class Pace:
    """How long and how fast."""

    steps: int
    optimizer: Optimiser = "adamw"
    schedule: Schedule = "cosine"
    warm: float = 0.0  # share of the steps in which rates rise linearly
    turns: int = 1  # parts of the steps, each with a fresh optimizer
    checks: int = 4  # times that the held-out loss is asked for
    best: bool = True  # go back to the best check in the end, the start included; else to the last
    norm: float = 0.0  # gradients are scaled down to this norm; 0 = never


@dataclass
class Tuned:
    """What a loop has done.  Losses are in the units of the functions given to `tune`."""

    start: float  # held-out loss before
    end: float  # held-out loss of what was kept
    first: float  # training loss of the first steps
    last: float  # training loss of the last steps
    kept: bool  # anything but the start was kept
    restarts: int = 0  # times that a loss was not finite


class SignSGD(Optimizer):
    """theta <- theta - lr sign(gradient) (signSGD, arXiv:1802.04434; as AutoRound uses it)."""

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign_(), alpha=-group["lr"])


def make_optimizer(name: Optimiser, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of torch or torchao; betas 0.9 and 0.999, no decay where a group asks for none.

    Raises ValueError where torchao is missing.
    """
    if name == "sign":
        return SignSGD(groups)
    if name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "optimizer = 'adamw8bit' needs torchao\nit is not installed\npip install torchao"
            ) from error
        found: Optimizer = AdamW8bit(groups, weight_decay=0.0, eps=TINY)
        return found
    made = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return made(groups, weight_decay=0.0, eps=TINY)


def rate(step: int, steps: int, schedule: Schedule, warm: float = 0.0) -> float:
    """Share of the first rate at step 0..steps-1."""
    rise = int(warm * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(steps - rise, 1)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def batches(windows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless LongTensors [size] of window numbers: shuffled epochs, incomplete tails dropped."""
    assert size <= windows, (size, windows)
    while True:
        order = torch.randperm(windows, generator=generator)
        yield from torch.split(order[: windows - windows % size], size)


def tune(
    subject: Tunable,
    gradients: Callable[[int], Tensor],
    held: Callable[[], float],
    pace: Pace,
) -> Tuned:
    """Minimise: `gradients(step)` adds to .grad and gives the loss, `held` the loss on held-outs.

    The result is never worse than the start in `held`: with best=True the best check is kept,
    otherwise the last one or, where that is worse, the start.  A loss that is not finite sends the
    loop back to what it would keep, with half the rates.
    """
    loop = _Loop(subject, held, pace)
    for turn in range(loop.turns):
        subject.begin(turn, loop.turns)
        loop.renew()
        steps = range(pace.steps * turn // loop.turns, pace.steps * (turn + 1) // loop.turns)
        for step in steps:
            loop.step(step, gradients)
    return loop.finish()


class _Loop:
    """State of one call of `tune`."""

    def __init__(self, subject: Tunable, held: Callable[[], float], pace: Pace) -> None:
        self.subject, self.held, self.pace = subject, held, pace
        self.turns = min(pace.turns, max(pace.steps, 1))
        self.marks = {round(pace.steps * (i + 1) / pace.checks) for i in range(pace.checks)}
        self.start = self.best = held()
        self.first = self.good = copied(subject.state())
        self.improved, self.restarts, self.slow = False, 0, 1.0
        self.losses: list[Tensor] = []  # since the last check, on the device
        self.trained: list[float] = []  # their means

    def renew(self) -> None:
        """A fresh optimizer for what the subject says now."""
        groups = self.subject.groups()
        self.bases = [group["lr"] for group in groups]
        self.optimizer = make_optimizer(self.pace.optimizer, groups)

    def step(self, step: int, gradients: Callable[[int], Tensor]) -> None:
        """One step, and a check where one is due."""
        pace, groups = self.pace, self.optimizer.param_groups
        share = self.slow * rate(step, pace.steps, pace.schedule, pace.warm)
        for group, base in zip(groups, self.bases, strict=True):
            group["lr"] = base * share
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(gradients(step).detach())
        if pace.norm:
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], pace.norm)
        self.optimizer.step()
        self.subject.stepped()
        if step + 1 in self.marks:
            self.check()

    def check(self) -> None:
        """Ask for the held-out loss, and keep or go back."""
        value, recent = self.held(), float(torch.stack(self.losses).mean())
        self.losses.clear()
        if not (math.isfinite(value) and math.isfinite(recent)):
            self.subject.restore(self.good)
            self.restarts, self.slow = self.restarts + 1, self.slow / 2
            self.renew()
            return
        self.trained.append(recent)
        if value < self.best or not self.pace.best:
            self.best, self.good, self.improved = value, copied(self.subject.state()), True

    def finish(self) -> Tuned:
        """Leave the subject in the state that is kept."""
        if self.best >= self.start:
            self.best, self.good, self.improved = self.start, self.first, False
        self.subject.restore(self.good)
        first, last = self.trained[:1] or [math.nan], self.trained[-1:] or [math.nan]
        return Tuned(self.start, self.best, first[0], last[0], self.improved, self.restarts)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}
