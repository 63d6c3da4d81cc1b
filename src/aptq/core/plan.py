"""Plan: which grid every linear gets, and what that costs exactly."""

import difflib
import fnmatch
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from aptq.core.reading import NAMES, read_json
from aptq.core.target import Candidate, PartSpec, Target, candidate, target_of

__all__ = ["Candidate", "PartSpec", "Plan", "Shapes", "Target", "candidate", "target_of"]

Shapes = dict[str, tuple[int, int]]  # full layer name -> (out, in)

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Targets of all linears inside the blocks by full name, and a note on who made the plan.

    It may also name the embedding and an untied head (Model.outer_shapes), which stay as they are
    otherwise and never count in bits per weight.
    """

    targets: dict[str, Target]
    made_by: dict[str, str] = field(default_factory=dict)

    @classmethod
    def uniform(
        cls, shapes: Mapping[str, tuple[int, int]], grid: Candidate, keep: Sequence[str] = ()
    ) -> "Plan":
        """One grid or target for all layers but those that match a glob pattern of keep.

        Raises ValueError if a pattern matches no layer.
        """
        kept: set[str] = set()
        for pattern in keep:
            matched = fnmatch.filter(shapes, pattern)
            if not matched:
                _unknown(f"keep pattern {pattern!r} matches no layer", pattern, shapes)
            kept.update(matched)
        chosen = target_of(grid)
        targets = {name: Target() if name in kept else chosen for name in shapes}
        return cls(targets, {"rule": "uniform", "grid": str(grid)})

    def check(
        self,
        shapes: Mapping[str, tuple[int, int]],
        outer: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Raise ValueError unless the plan names all layers of `shapes` and else only of `outer`.

        shapes: (out, in) of the linears inside the blocks; outer: of what lies outside them.
        """
        known = {**shapes, **(outer or {})}
        for name in self.targets:
            if name not in known:
                _unknown(f"the plan names layer {name!r}, which the model lacks", name, known)
        for name in shapes:
            if name not in self.targets:
                _unknown(f"the plan lacks layer {name!r} of the model", name, self.targets)
        wide = {**(outer or {}), **shapes}
        odd = [name for name, target in self.targets.items() if not target.fits(wide[name])]
        if odd:
            target, shape = self.targets[odd[0]], wide[odd[0]]
            why = f"{shape[1]} columns are no multiple of 256"
            instead = "choose other grids for them: a budget with profile gguf mixes them by width"
            if target.rank > min(shape):
                why, instead = f"it is {shape[0]} x {shape[1]}", "give it a smaller rank"
            raise ValueError(
                f"{target} cannot hold some layers\n{len(odd)} of {len(self.targets)}, "
                f"first {odd[0]}: {why}\n{instead}"
            )

    def nbytes(
        self, shapes: Mapping[str, tuple[int, int]], itemsize: int = 2, outer: Collection[str] = ()
    ) -> int:
        """Bytes stored for all layers of the plan but those in `outer`.

        itemsize: bytes of a kept weight's element.  Raises ValueError for a name in neither.
        """
        total = 0
        for name, target in self.targets.items():
            if name in outer:
                continue
            if name not in shapes:
                _unknown(f"the plan names layer {name!r}, which the model lacks", name, shapes)
            total += target.nbytes(shapes[name], itemsize)
        return total

    def bits(
        self, shapes: Mapping[str, tuple[int, int]], itemsize: int = 2, outer: Collection[str] = ()
    ) -> float:
        """Stored bits for each weight, over the layers that nbytes counts, kept ones included."""
        total = self.nbytes(shapes, itemsize, outer)
        weights = sum(math.prod(shapes[name]) for name in self.targets if name not in outer)
        return 8 * total / weights if weights else 0.0

    def to_json(self) -> dict[str, object]:
        """Compact form: {"grids": [text of a target, ...], "targets": {layer: index}}."""
        texts = {name: str(target) for name, target in self.targets.items()}
        grids = list(dict.fromkeys(texts.values()))
        index = {text: position for position, text in enumerate(grids)}
        return {"grids": grids, "targets": {name: index[text] for name, text in texts.items()}}

    @classmethod
    def from_json(cls, data: object) -> "Plan":
        """The inverse of to_json (made_by is not part of it).  Raises ValueError."""
        fields = _closed(data, {"grids": list, "targets": dict})
        grids, targets = fields["grids"], fields["targets"]
        assert isinstance(grids, list)
        assert isinstance(targets, dict)
        for entry in grids:
            if not isinstance(entry, str):
                _broken(f"grid {entry!r} is not a text")
        parsed = [Target.parse(entry) for entry in grids]
        for name, index in targets.items():
            if type(index) is not int or not 0 <= index < len(parsed):
                _broken(f"layer {name!r} has grid number {index!r} of {len(parsed)}")
        return cls({name: parsed[index] for name, index in targets.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        data = {"version": VERSION, "made_by": self.made_by, **self.to_json()}
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read what save wrote.  Raises ValueError that names the file."""
        try:
            data = read_json(Path(path), NAMES)
            kinds = {"version": int, "made_by": dict, "grids": list, "targets": dict}
            fields = _closed(data, kinds)
            if fields["version"] != VERSION:
                _broken(f"version {fields['version']}, this program reads version {VERSION}")
            made_by = fields["made_by"]
            assert isinstance(made_by, dict)
            if not all(isinstance(value, str) for value in made_by.values()):
                _broken("made_by must map texts to texts")
            plan = cls.from_json({"grids": fields["grids"], "targets": fields["targets"]})
        except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
            reason = " ".join(str(error).splitlines())
            way_out = "use the plan.json of a run folder, or one like it"
            raise ValueError(f"not a plan: {path}\n{reason}\n{way_out}") from error
        return cls(plan.targets, made_by)


def _closed(data: object, kinds: Mapping[str, type]) -> dict[str, object]:
    """data if it is a dict with exactly these keys, each of its kind."""
    if not isinstance(data, dict) or data.keys() != kinds.keys():
        found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        _broken(f"found {found}, expected exactly the keys {sorted(kinds)}")
    for key, kind in kinds.items():
        if type(data[key]) is not kind:
            _broken(f"{key} is a {type(data[key]).__name__}, expected {kind.__name__}")
    return data


def _unknown(what: str, given: str, known: Mapping[str, object]) -> NoReturn:
    close = difflib.get_close_matches(given, known, n=3, cutoff=0.3) or list(known)[:3]
    raise ValueError(f"{what}\namong {len(known)} layers\ndid you mean {', '.join(close)}?")


def _broken(detail: str) -> NoReturn:
    raise ValueError(f"broken plan: {detail}")  # whoever reads a file adds its name
