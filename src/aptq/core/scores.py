"""Scores: the damage that every candidate target is predicted to do to every layer, with units."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from aptq.core.plan import Plan, Target
from aptq.core.reading import NAMES, read_json
from aptq.registry import closest

VERSION = 1
Table = dict[str, tuple[float, ...]]  # layer -> one number for each candidate (or position bin)


@dataclass(frozen=True)
class Scores:
    """A table layer x candidate; damages add up over layers.  Raises ValueError if it is broken."""

    measure: str
    unit: Literal["nats", "relative"]  # nats per token, or a number that only orders
    candidates: tuple[str, ...]  # str(Target) of every candidate
    losses: Table  # as measured: may be negative
    noise: Table  # standard errors from split halves; 0.0 where unknown
    factor: float | None = None  # nats per unit, fitted on the measured divergence of plans
    residual: float | None = None  # relative error of that fit
    window: int = 0  # tokens of a window at which profiles were measured; 0 = none
    profiles: Table = field(default_factory=dict)  # mean squared output gradient by position bin
    record: dict[str, str] = field(default_factory=dict)  # source, data, tokens, seed, stages

    def __post_init__(self) -> None:
        if self.unit not in ("nats", "relative"):
            _broken(f"unit {self.unit!r} is neither nats nor relative")
        for text in self.candidates:
            Target.parse(text)
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            _broken(f"candidates must be one or more and differ: {', '.join(self.candidates)}")
        if self.losses.keys() != self.noise.keys():
            _broken(f"{len(self.losses)} layers have losses, {len(self.noise)} have noise")
        for name, row in [*self.losses.items(), *self.noise.items()]:
            if len(row) != len(self.candidates) or not all(map(math.isfinite, row)):
                _broken(f"{name!r} needs {len(self.candidates)} finite numbers, has {row}")
        positive = [*self.noise.values(), *self.profiles.values(), (self.residual or 0.0,)]
        if not all(value >= 0 and math.isfinite(value) for row in positive for value in row):
            _broken("noise, profiles and residual must be finite and not below 0")
        if self.factor is not None and not 0 < self.factor < math.inf:
            _broken(f"factor {self.factor} is not above 0")
        if self.window < 0 or (self.profiles and not self.window):
            _broken(f"{len(self.profiles)} profiles of windows of {self.window} tokens")

    def nats(self, plan: Plan) -> tuple[float, float] | None:
        """Expected loss of a whole plan and its standard error, nats per token.

        Losses below 0 count as 0, kept layers cost nothing, errors of layers are taken as
        independent and the residual of the fit is added to them.  None if the unit is relative and
        no factor is known.  Raises ValueError for a target that was not measured.
        """
        if self.unit == "relative" and self.factor is None:
            return None
        factor = 1.0 if self.factor is None else self.factor
        losses, squares = [], []
        for name, target in plan.targets.items():
            if not target.kept:
                loss, noise = self.of(name, target)
                losses.append(max(loss, 0.0))
                squares.append(noise**2)
        total = factor * math.fsum(losses)
        return total, math.hypot(
            factor * math.sqrt(math.fsum(squares)), total * (self.residual or 0.0)
        )

    def of(self, name: str, target: Target) -> tuple[float, float]:
        """Measured loss and noise of one layer; ValueError if that was not measured."""
        if name not in self.losses or str(target) not in self.candidates:
            missing = f"layer {name!r}" if name not in self.losses else f"candidate {target}"
            raise ValueError(
                f"no score for {name} as {target}\nthe table of measure {self.measure!r} lacks "
                f"{missing}; it has {len(self.losses)} layers and the candidates "
                f"{', '.join(self.candidates)}\nmeasure again with it, or leave it out"
            )
        index = self.candidates.index(str(target))
        return self.losses[name][index], self.noise[name][index]

    def check(self, shapes: Iterable[str]) -> None:
        """Raise ValueError if a layer was scored that is not among `shapes`."""
        known = list(shapes)
        for name in self.losses.keys() - set(known):
            raise ValueError(
                f"the scores name layer {name!r}, which the model lacks\n"
                f"scores: {len(self.losses)} layers, model: {len(known)}\n{closest(name, known)}"
            )

    def merge(self, other: "Scores") -> "Scores":
        """Both tables in one: the same layers with other candidates, or other layers.

        A factor remains only if both have the same.  Raises ValueError where measure, unit or
        window differ, or where the tables overlap.
        """
        same = (self.measure, self.unit) == (other.measure, other.unit)
        windows = {scores.window for scores in (self, other) if scores.window}
        rows = self.losses.keys() == other.losses.keys()
        apart = not set(self.candidates) & set(other.candidates)
        more = self.candidates == other.candidates and not self.losses.keys() & other.losses.keys()
        if not same or len(windows) > 1 or not (more or (rows and apart)):
            raise ValueError(
                f"these scores cannot be merged\n{self.measure} in {self.unit}, window "
                f"{self.window}, with {other.measure} in {other.unit}, window {other.window}\n"
                "merge tables of one measure, that share either layers or candidates"
            )

        def joined(one: Table, two: Table) -> Table:
            return {**one, **two} if more else {name: one[name] + two[name] for name in one}

        fit = self.factor == other.factor and self.residual == other.residual
        return dataclasses.replace(
            self,
            candidates=self.candidates if more else self.candidates + other.candidates,
            losses=joined(self.losses, other.losses),
            noise=joined(self.noise, other.noise),
            factor=self.factor if fit else None,
            residual=self.residual if fit else None,
            window=max(self.window, other.window),
            profiles={**other.profiles, **self.profiles},
            record={**other.record, **self.record},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        Path(path).write_bytes(self.text())

    def text(self) -> bytes:
        """The file that `save` writes."""
        data = {"version": VERSION, **dataclasses.asdict(self)}
        return (json.dumps(data, indent=1) + "\n").encode("utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read what save wrote.  Raises ValueError that names the file."""
        try:
            return cls._read(read_json(Path(path), NAMES))
        except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
            reason = " ".join(str(error).splitlines())
            way_out = "use the scores.json of a run folder, or measure again"
            raise ValueError(f"not scores: {path}\n{reason}\n{way_out}") from error

    @classmethod
    def _read(cls, data: Any) -> "Scores":
        keys = {"version", *(item.name for item in dataclasses.fields(cls))}
        if not isinstance(data, dict) or data.keys() != keys:
            found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            _broken(f"found {found}, expected exactly the keys {sorted(keys)}")
        if data.pop("version") != VERSION:
            _broken(f"another version; this program reads version {VERSION}")
        for name in ("factor", "residual"):
            data[name] = None if data[name] is None else _numbers([data[name]], name)[0]
        if type(data["measure"]) is not str or type(data["window"]) is not int:
            _broken("measure must be a text and window a whole number")
        if type(data["candidates"]) is not list:
            _broken("candidates must be a list of texts")
        data["candidates"] = _texts(data["candidates"])
        for name in ("losses", "noise", "profiles", "record"):
            if type(data[name]) is not dict:
                _broken(f"{name} must be a table")
        _texts(data["record"].values())
        for name in ("losses", "noise", "profiles"):
            data[name] = {key: _numbers(row, f"{name} of {key}") for key, row in data[name].items()}
        return cls(**data)


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    found = tuple(value for value in values if isinstance(value, str))
    if len(found) < len(list(values)):
        _broken("candidates and the values of record must be texts")
    return found


def _numbers(values: object, where: str) -> tuple[float, ...]:
    if not isinstance(values, list) or any(type(value) not in (int, float) for value in values):
        _broken(f"{where} must be numbers, not {values!r}")
    return tuple(map(float, values))


def _broken(detail: str) -> NoReturn:
    raise ValueError(f"broken scores: {detail}")  # whoever reads a file adds its name
