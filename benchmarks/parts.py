"""Tables of sums of parts: factors and outliers beside codes, widths by group, all chosen together.

usage: python parts.py MODEL --device cuda --gpus 4 --scratch FOLDER [--only rank joint]
Rows are run as rows.py says.  Those of "bits" are the default recipe at exactly the size of a row
with factors or outliers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rows import Job, Table, arguments, behind, run, scores, shipped, written

from aptq.core.plan import Plan, Target
from aptq.model.model import Model

BASE = "int3-g64-z"
RANKS = ("r16", "r32", "r64", "r32@int8-row", "r64@int8-row")
OUTLIERS = ("+o0.25%", "+o0.5%", "+o1%")
SMALL = ("2.28125", "2.5", "3.0", "3.5")  # bpw of joint plans
JOINED = ["--recipe", "aptq-parts"]
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
        yield _bits(scratch, model, text)
    yield f"{BASE} by gptq", [*recipe(scratch, "gptq"), "--grid", BASE]


def outliers(scratch: Path, model: Path) -> Iterator[Job]:
    """Single weights by several scores, and the same bytes spent on bits."""
    for added in OUTLIERS:
        text = f"{BASE}{added}"
        for name in ("spqr", "gwq", "tacq") if added == "+o0.5%" else ("spqr",):
            yield f"{text} by {name}", [*recipe(scratch, name, "gptq"), "--grid", text]
        yield _bits(scratch, model, text)


def _bits(scratch: Path, model: Path, text: str) -> Job:
    budget = ["--budget", f"{bits(model, text):.6f}bpw"]
    return f"bits of {text}", [*budget, *known_scores(scratch, "bits")]


def known_scores(scratch: Path, name: str) -> list[str]:
    """--scores and the file that serves all sizes."""
    return ["--scores", str(scratch / f"scores-{name}.json")]


def joint(scratch: Path, _model: Path) -> Iterator[Job]:
    """Bits, rank and outliers of every layer chosen together, against bits alone."""
    for size in SMALL:
        budget = ["--budget", f"{size}bpw"]
        yield f"joint {size}", [*JOINED, *budget, *known_scores(scratch, "joint")]
        yield f"bits alone {size}", [*budget, *known_scores(scratch, "bits")]


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


def main() -> None:
    options = arguments(__doc__, tuple(PARTS))
    scratch = options.scratch
    made = {name: part(scratch, options.model) for name, part in PARTS.items()}
    measured = {"bits": ["--recipe", "aptq"], "joint": JOINED}
    first = [
        scores(options, Path(known_scores(scratch, name)[1]), *words)
        for name, words in measured.items()
    ]
    run(options, made, first)


if __name__ == "__main__":
    main()
