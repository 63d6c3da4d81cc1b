"""Tables of sums of parts: factors and outliers beside codes, widths by group, all chosen together.

usage: python parts.py MODEL --device cuda --gpus 4 --scratch FOLDER [--only rank joint]
Every row is a process of quality.py; finished rows are skipped.  Rows of "bits" are the default
recipe at exactly the size of a row with factors or outliers.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import common
from reconstruction import FEW, Job, Table, Workers, behind, protocol, shipped, written

from aptq.core.plan import Plan, Target
from aptq.model.model import Model

BASE = "int3-g64-z"
RANKS = ("r16", "r32", "r64", "r32@int8-row", "r64@int8-row")
OUTLIERS = ("o0.25%", "o0.5%", "o1%")
SMALL = ("2.28125", "2.5", "3.0", "3.5")  # bpw of joint plans
# beside every grid of FEW below 4 bits; together with their sums
ADDED = ("", "+r8@int8-row", "+r16@int8-row", "+r32@int8-row", "+o0.25%", "+o0.5%", "+o1%")
WIDTHS = ("int2-g64-z", "int3-g64-z")
CIRCUITS = ("int2-row-z+o0.35%", "int3-row-z+o0.35%")


def stages() -> dict[str, Table]:
    """The default's gptq, and what goes by the same Hessian beside it."""
    gptq = shipped("aptq")["stage"][0]
    found = {"gptq": gptq, "eora": behind(gptq, "eora"), "lqlora": {"use": "lqlora"}}
    found |= {"spqr": {"use": "spqr", "rows": gptq["rows"]}, "svd": {"use": "svd"}}
    return found | {name: {"use": name} for name in ("gwq", "tacq", "slim", "lrec", "rtn")}


def recipe(scratch: Path, *names: str, **more: object) -> list[str]:
    """--recipe and the file of one that runs these stages."""
    known = stages()
    table: Table = {**more, "stage": [known[name] for name in names]}
    return written(scratch, f"parts {' '.join(names)} {len(str(more))}", table)


def bits(model: Path, text: str) -> float:
    """Bits per weight of a uniform plan."""
    shapes = Model.outline(model).shapes
    return Plan(dict.fromkeys(shapes, Target.parse(text))).bits(shapes)


def rank(scratch: Path, model: Path) -> Iterator[Job]:
    """Factors by several methods, and the same bytes spent on bits."""
    for added in RANKS:
        text = f"{BASE}+{added}"
        for name in ("eora", "svd") if added == "r32" else ("eora",):
            yield f"{text} by {name}", [*recipe(scratch, "gptq", name), "--grid", text]
        if added == "r32":
            yield f"{text} by lqlora", [*recipe(scratch, "lqlora"), "--grid", text]
            trained = recipe(scratch, "gptq", "eora", "lrec")
            yield f"{text} by eora and lrec", [*trained, "--grid", text]
        yield from _bits(model, text)
    yield f"{BASE} by gptq", [*recipe(scratch, "gptq"), "--grid", BASE]


def outliers(scratch: Path, model: Path) -> Iterator[Job]:
    """Single weights by several scores, and the same bytes spent on bits."""
    for added in OUTLIERS:
        text = f"{BASE}+{added}"
        for name in ("spqr", "gwq", "tacq") if added == "o0.5%" else ("spqr",):
            yield f"{text} by {name}", [*recipe(scratch, name, "gptq"), "--grid", text]
        yield from _bits(model, text)


def _bits(model: Path, text: str) -> Iterator[Job]:
    size = bits(model, text)
    yield f"bits of {text}", ["--recipe", "aptq", "--budget", f"{size:.6f}bpw"]


def joint(scratch: Path, _model: Path) -> Iterator[Job]:
    """Bits, rank and outliers of every layer chosen together, against bits alone."""
    grids = [g for g in shipped("aptq")["grids"] if int(g[3]) > 3 or g == "bf16"]
    low = [f"{grid}{more}" for grid in FEW if int(grid[3]) < 4 for more in ADDED]
    table = shipped("aptq") | {"grids": [*low, *grids]}
    known = stages()
    table["stage"] = [known["spqr"], known["gptq"], known["eora"]]
    words = written(scratch, "parts joint", table)
    for size in SMALL:
        yield f"joint {size}", [*words, "--budget", f"{size}bpw"]
        yield f"bits alone {size}", ["--recipe", "aptq", "--budget", f"{size}bpw"]


def widths(scratch: Path, _model: Path) -> Iterator[Job]:
    """SliM's bits by group against one width, by its own sweep and by the default's."""
    for grid in WIDTHS:
        for text in (grid, f"{grid}~"):
            yield f"{text} by slim", [*recipe(scratch, "slim"), "--grid", text]
        yield f"{grid} by gptq", [*recipe(scratch, "gptq"), "--grid", grid]


def circuits(scratch: Path, _model: Path) -> Iterator[Job]:
    """TaCQ at the paper's size, the same share in every layer."""
    for text in CIRCUITS:
        for name in ("tacq", "gwq", "spqr"):
            yield f"{text} by {name}", [*recipe(scratch, name, "gptq"), "--grid", text]
        grid = text.partition("+")[0]
        yield f"{grid} by gptq", [*recipe(scratch, "gptq"), "--grid", grid]


PARTS = {"rank": rank, "outliers": outliers, "joint": joint, "widths": widths, "circuits": circuits}


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Rows that are asked for, as commands."""
    name = options.name or f"parts-{options.device.split(':')[0]}"
    rows = ["--results", str(options.results), "--texts", "all", "--name", name]
    for part in options.only:
        for label, more in PARTS[part](options.scratch, options.model):
            if re.search(options.match, label):
                fixed = ["quality.py", str(options.model), "--label", label]
                yield label, [*fixed, *protocol(options), *rows, *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--name", help="result file; default: parts-DEVICE")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for recipes")
    parser.add_argument("--gpus", type=int, default=0, help="0 = as the environment has it")
    parser.add_argument("--workers", type=int, default=0, help="0 = one for each of --gpus")
    parser.add_argument("--samples", default="96")
    parser.add_argument("--length", default="2048")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after these")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--match", default="", help="rows whose label has this pattern")
    parser.add_argument("--list", action="store_true", help="print the rows, run nothing")
    options = parser.parse_args()
    for name in ("model", "shared", "results", "scratch"):  # rows run in another folder
        setattr(options, name, getattr(options, name).resolve())
    options.scratch.mkdir(parents=True, exist_ok=True)
    chosen = list(jobs(options))
    if options.list:
        for label, words in chosen:
            print(f"{label}\n    {shlex.join(words)}")
        return
    Workers(options).run_all(chosen)


if __name__ == "__main__":
    main()
