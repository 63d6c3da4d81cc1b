"""Recipe: everything that decides a result besides the model and the plan, as one TOML file.

A table of a stage, a measure or an allocator is its dataclass: `use` is the registered name, every
other key one of its fields.
"""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from aptq.allocate import Allocator, allocators
from aptq.core.budget import Budget
from aptq.core.plan import Candidate, candidate
from aptq.core.reading import printable, read_bytes
from aptq.engine.data import Data
from aptq.engine.measure import Measure
from aptq.engine.stage import Stage, methods
from aptq.options import construct, plain
from aptq.registry import Registry, closest

T = TypeVar("T")
Profile = Literal["aptq", "transformers", "gguf", "vllm"]
_TABLES = ("measure", "allocate", "stage")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order, the grids to choose from and how to choose, and the calibration data."""

    stages: tuple[Stage, ...]
    # candidates: grids, or sums such as int3-g64-z+o0.5%+r16; empty = every grid of the planner
    grids: tuple[Candidate, ...] = ()
    budget: str = "4bpw"  # several with commas; "" = none: `grids` holds the one grid of all layers
    keep: tuple[str, ...] = ()  # name patterns of layers left at their source dtype
    minimum: tuple[str, ...] = ()  # "PATTERN=BITS": layers that get codes of at least so many bits
    profile: Profile = "aptq"  # engine that shall run it: which layers must share a grid, and which
    outer: bool = False  # the embedding and the head may be compressed too, where it pays
    nats: bool = False  # fit what a unit of the measure costs in nats: three more walks
    data: Data = field(default_factory=Data)
    order: Literal["block", "group"] = "block"  # "group" = true-sequential, one pass for each group
    seed: int = 0  # of everything random but the windows, which have data.seed
    measure: Measure | None = None
    allocate: Allocator | None = None  # None: the same grid for all layers

    def __post_init__(self) -> None:
        """Raise ValueError for a budget or a minimum that is none, and stages in no order."""
        if self.budget:
            Budget.parse_list(self.budget)
        whole = [stage.whole for stage in self.stages]
        if whole != sorted(whole):
            late = self.stages[whole.index(True)]
            raise ValueError(
                f"a stage comes too early\n{late.name} works on the whole compressed model, and "
                "stages that work on blocks follow it\nput it last in the recipe"
            )
        if self.stages and self.data.written and True not in whole:
            raise ValueError(
                "nothing would look at the windows that the model writes\n"
                f"written = {self.data.written}, and no stage works on the whole model\n"
                "set written = 0, or add a stage such as e2e_qp"
            )
        for text in self.minimum:
            pattern, _, bits = text.rpartition("=")
            if not pattern or not bits.isdigit():
                raise ValueError(
                    f"not a minimum: {text!r}\na name pattern, =, and whole bits are expected\n"
                    "try '*.v_proj=4'"
                )

    @property
    def budgets(self) -> tuple[str, ...]:
        """The single budgets; ("",) where there is none."""
        return tuple(part.strip() for part in self.budget.split(","))

    @property
    def minimums(self) -> dict[str, int]:
        """Name pattern -> least bits of a code."""
        pairs = (text.rpartition("=") for text in self.minimum)
        return {pattern: int(bits) for pattern, _, bits in pairs}

    @classmethod
    def load(cls, source: str | Path) -> "Recipe":
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
        try:
            text = read_bytes(path).decode("utf-8")
        except ValueError as error:
            instead = "give a small text file in UTF-8"
            raise ValueError(f"{path} is no recipe\n{printable(error)}\n{instead}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> "Recipe":
        """The recipe in TOML `text`; `where` names it in errors."""
        try:
            table = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            reason = printable(error)
            raise ValueError(f"{where} is not TOML\n{reason}\ncorrect that line") from error
        known = ("stage", *(x.name for x in dataclasses.fields(cls) if x.name != "stages"))
        for key in table:
            if key not in known:
                raise ValueError(f"unknown key {key!r}\nin recipe {where}\n{closest(key, known)}")
        tables = {key: table.pop(key, None) for key in _TABLES}
        stages = tables["stage"]
        if not isinstance(stages, list) or not stages:
            raise ValueError(
                f"a recipe without stages\n{where} has no [[stage]] table\n"
                f"add one, for example: [[stage]] with use = 'gptq'"
            )
        recipe = construct(cls, {**table, "stages": ()}, where)
        made: dict[str, Any] = {
            "stages": tuple(
                _stage(options, f"[[stage]] {number} of {where}")
                for number, options in enumerate(stages)
            )
        }
        if tables["measure"] is not None:
            made["measure"] = _measure(tables["measure"], f"[measure] of {where}")
        if tables["allocate"] is not None:
            place = f"[allocate] of {where}"
            made["allocate"] = _named(allocators, tables["allocate"], place, "milp")
        return dataclasses.replace(recipe, **made)

    def adapt(
        self,
        *,
        grid: str | None = None,
        budget: str | None = None,
        keep: tuple[str, ...] = (),
        profile: Profile | None = None,
        source: str | None = None,
        samples: int | None = None,
        length: int | None = None,
        seed: int | None = None,
    ) -> "Recipe":
        """The recipe with some of its values replaced (None and () leave them).

        A grid without a budget is taken as it is; a profile brings the candidates of its engine;
        `seed` is also that of the data.
        """
        candidates = () if profile in ("gguf", "vllm") else self.grids
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
            grids=candidates if grid is None else (candidate(grid),),
            budget=self.budget if (budget, grid) == (None, None) else budget or "",
            keep=keep or self.keep,
            profile=profile or self.profile,
            seed=self.seed if seed is None else seed,
        )

    def text(self) -> str:
        """The recipe as TOML with every option written out: the inverse of `parse`."""
        table = {k: v for k, v in plain(self).items() if k not in ("stages", *_TABLES)}
        texts = [tomli_w.dumps(table)]
        if self.measure is not None:
            texts.append(f"[measure]\n{_table(methods, self.measure)}")
        if self.allocate is not None:
            texts.append(f"[allocate]\n{_table(allocators, self.allocate)}")
        texts += [f"[[stage]]\n{_table(methods, stage)}" for stage in self.stages]
        return "\n".join(texts)

    def dump(self, path: Path) -> None:
        """Write `text()` to `path`."""
        path.write_text(self.text(), "utf-8")


def shipped_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = resources.files("aptq") / "recipes"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def _stage(options: Any, where: str) -> Stage:
    made = _named(methods, options, where, "gptq")
    if isinstance(made, Measure):
        raise ValueError(
            f"{options['use']} measures, it changes no layer\n{where}\n"
            f"write it as [measure] with use = {options['use']!r}"
        )
    return made


def _measure(options: Any, where: str) -> Measure:
    made = _named(methods, options, where, "fisher")
    if not isinstance(made, Measure):
        raise ValueError(
            f"{options['use']} changes layers, it measures nothing\n{where}\n"
            f"write it as [[stage]] with use = {options['use']!r}"
        )
    return made


def _named(registry: Registry[T], options: Any, where: str, example: str) -> T:
    """What the table `options` names in `registry`, with its other keys as fields."""
    if not isinstance(options, dict) or not isinstance(options.get("use"), str):
        raise ValueError(f"a table without a method\n{where}\nadd use = {example!r}, say")
    chosen = {key: value for key, value in options.items() if key != "use"}
    return construct(registry.get(options["use"]), chosen, f"{where} ({options['use']})")


def _table(registry: Registry[T], made: T) -> str:
    return tomli_w.dumps({"use": registry.name_of(type(made)), **plain(made)})
