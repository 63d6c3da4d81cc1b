"""Recipe: everything that decides a result besides the model and the plan, as one TOML file.

A stage's table is its dataclass: `use` is the registered name, every other key one of its fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import tomli_w

from aptq.core.grid import Grid
from aptq.engine.data import Data
from aptq.engine.stage import Stage, methods
from aptq.registry import closest

T = TypeVar("T")
_KEYS = ("grids", "budget", "keep", "order", "seed", "data", "stage")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order, the grids to choose from, and the calibration data."""

    stages: tuple[Stage, ...]
    grids: tuple[Grid, ...] = ()  # candidates; empty = every grid that the planner knows
    budget: str = "4bpw"  # "" = none: then `grids` holds the one grid of all layers
    keep: tuple[str, ...] = ()  # name patterns of layers left at their source dtype
    data: Data = field(default_factory=Data)
    order: Literal["block", "group"] = "block"  # "group" = true-sequential, one pass for each group
    seed: int = 0  # of everything random but the windows, which have data.seed

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a TOML file, or a shipped recipe by name; ValueError names the key that is wrong."""
        path = Path(source)
        if path.suffix != ".toml":
            shipped = resources.files("aptq") / "recipes" / f"{source}.toml"
            if not shipped.is_file():
                raise ValueError(
                    f"unknown recipe {str(source)!r}\n"
                    f"it is neither a .toml file nor one of the shipped recipes\n"
                    f"{closest(str(source), shipped_names())}"
                )
            return cls.parse(shipped.read_text("utf-8"), str(source))
        if not path.is_file():
            raise ValueError(f"no recipe at {path}\nthe file does not exist\ncheck the path")
        return cls.parse(path.read_text("utf-8"), str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Recipe:
        """The recipe in TOML `text`; `where` names it in errors."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{where} is not TOML\n{error}\ncorrect that line") from error
        for key in table:
            if key not in _KEYS:
                raise ValueError(f"unknown key {key!r}\nin recipe {where}\n{closest(key, _KEYS)}")
        stages = table.pop("stage", [])
        if not isinstance(stages, list) or not stages:
            raise ValueError(
                f"a recipe without stages\n{where} has no [[stage]] table\n"
                f"add one, for example: [[stage]] with use = 'gptq'"
            )
        table["stages"] = tuple(
            _stage(options, f"[[stage]] {number} of {where}")
            for number, options in enumerate(stages)
        )
        return construct(cls, table, where)

    def adapt(
        self,
        *,
        grid: str | None = None,
        budget: str | None = None,
        keep: tuple[str, ...] = (),
        source: str | None = None,
        samples: int | None = None,
        length: int | None = None,
        seed: int | None = None,
    ) -> Recipe:
        """The recipe with some of its values replaced (None and () leave them).

        A grid without a budget is taken as it is; `seed` is also that of the data.
        """
        changes: dict[str, Any] = {
            "source": source,
            "samples": samples,
            "length": length,
            "seed": seed,
        }
        data = dataclasses.replace(
            self.data, **{key: value for key, value in changes.items() if value is not None}
        )
        return dataclasses.replace(
            self,
            data=data,
            grids=self.grids if grid is None else (Grid.parse(grid),),
            budget=self.budget if (budget, grid) == (None, None) else budget or "",
            keep=keep or self.keep,
            seed=self.seed if seed is None else seed,
        )

    def text(self) -> str:
        """The recipe as TOML with every option written out: the inverse of `parse`."""
        table = {key: value for key, value in plain(self).items() if key != "stages"}
        parts = [tomli_w.dumps(table)]
        for stage in self.stages:
            options = {"use": methods.name_of(type(stage)), **plain(stage)}
            parts.append("[[stage]]\n" + tomli_w.dumps(options))
        return "\n".join(parts)

    def dump(self, path: Path) -> None:
        """Write `text()` to `path`."""
        path.write_text(self.text(), "utf-8")


def shipped_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = resources.files("aptq") / "recipes"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def _stage(options: Any, where: str) -> Stage:
    if not isinstance(options, dict) or not isinstance(options.get("use"), str):
        raise ValueError(f"a stage without a method\n{where}\nadd use = 'gptq', say")
    chosen = {key: value for key, value in options.items() if key != "use"}
    return construct(methods.get(options["use"]), chosen, f"{where} ({options['use']})")


def construct(cls: type[T], options: dict[str, Any], where: str) -> T:
    """An instance of dataclass `cls` from plain TOML values; every key and type is checked."""
    assert dataclasses.is_dataclass(cls), f"{cls} holds no options"
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for key in options:
        if key not in known:
            raise ValueError(f"unknown key {key!r}\nin {where}\n{closest(key, tuple(known))}")
    for name, item in known.items():
        bare = (item.default, item.default_factory) == (dataclasses.MISSING, dataclasses.MISSING)
        if bare and name not in options:
            raise ValueError(f"missing key {name!r}\nin {where}\nadd {name} = ...")
    return cls(**{k: _convert(v, hints[k], f"{k} in {where}") for k, v in options.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; ValueError if it does not fit."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise ValueError(f"{value!r} is no choice\nfor {where}\n{_choices(value, args)}")
    if origin in (types.UnionType, typing.Union):
        return _convert(value, next(arg for arg in args if arg is not types.NoneType), where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, args[0], where) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return construct(hint, value, where)
    if hint is Grid and isinstance(value, str):
        return Grid.parse(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    plain_class = isinstance(hint, type) and origin is None
    stray_bool = isinstance(value, bool) and hint is not bool  # Python counts it as an int
    if plain_class and isinstance(value, hint) and not stray_bool:
        return value
    wanted = _name(hint)
    raise ValueError(f"{value!r} is of the wrong type\nfor {where}\nwrite a value of type {wanted}")


def _choices(value: Any, args: tuple[Any, ...]) -> str:
    return closest(str(value), tuple(str(arg) for arg in args))


def plain(value: Any) -> Any:
    """Dataclasses, tuples, grids and paths as TOML's values; fields that are None are left out."""
    if isinstance(value, Grid | Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: plain(held) for name, held in pairs if held is not None}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


class Option(NamedTuple):
    """One option of a method as people read it."""

    name: str
    kind: str
    default: str
    why: str  # the comment at the field


def describe(cls: type) -> list[Option]:
    """The options of dataclass `cls`, with the comments that its source gives them."""
    assert dataclasses.is_dataclass(cls), f"{cls} holds no options"
    comments, hints = _comments(inspect.getsource(cls)), typing.get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        default = "" if item.default is dataclasses.MISSING else str(plain(item.default))
        why = comments.get(item.name, "")
        found.append(Option(item.name, _name(hints[item.name]), default, why))
    return found


def _comments(source: str) -> dict[str, str]:
    """field -> the comment above and beside it, as one line."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in source.splitlines():
        field_line = re.match(r" {4}(\w+): [^#]*(?:# *(.*))?$", line)
        if line.startswith("    #"):
            above.append(line.strip("# "))
        elif field_line:
            found[field_line[1]] = " ".join([*above, field_line[2] or ""]).strip()
            above = []
        else:
            above = []
    return found


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(arg) for arg in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
