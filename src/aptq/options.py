"""Dataclasses as plain values: the keys of a recipe, checked; and options as people read them."""

import dataclasses
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from aptq.core.grid import Grid
from aptq.core.plan import Candidate, Target, candidate
from aptq.registry import closest

T = TypeVar("T")


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
    if hint == Candidate and isinstance(value, str):
        return candidate(value)
    if hint is Grid and isinstance(value, str):
        return Grid.parse(value)
    if origin in (types.UnionType, typing.Union):
        return _convert(value, next(arg for arg in args if arg is not types.NoneType), where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, args[0], where) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return construct(hint, value, where)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    plain_class = isinstance(hint, type) and origin is None
    stray_bool = isinstance(value, bool) and hint is not bool  # Python counts it as an int
    if plain_class and isinstance(value, hint) and not stray_bool:
        return value
    wanted = _name(hint)
    raise ValueError(f"{value!r} is of the wrong type\nfor {where}\nwrite a value of type {wanted}")


def _choices(value: Any, args: tuple[Any, ...]) -> str:
    return closest(str(value), tuple(str(arg) for arg in args))


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """ "KEY=VALUE" texts as a dict; values in TOML's words, text without quotes."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.isidentifier():
            raise ValueError(f"not an option: {pair!r}\nKEY=VALUE is expected\ntry --set version=2")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


def plain(value: Any) -> Any:
    """Dataclasses, tuples, grids and paths as TOML's values; fields that are None are left out."""
    if isinstance(value, Grid | Target | Path):
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
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):  # inherited options have their comments there
        if dataclasses.is_dataclass(base):
            comments |= _comments(inspect.getsource(base))
    hints = typing.get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        known = item.default is not dataclasses.MISSING
        default = (str(plain(item.default)) or '""') if known else ""
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
