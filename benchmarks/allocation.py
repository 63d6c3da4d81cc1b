"""Tables of the allocation: sizes x measures at equal bytes, and Hessians x row weights at int3.

usage: python allocation.py MODEL --device cuda --workers 5 --scratch FOLDER [--only table seeds]
Rows are run as rows.py says.  A measure is taken once and its scores serve all sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rows import Job, arguments, run, scores

SIZES = {"4.3125": "int4-g64-z", "3.296875": "int3-g64-z", "2.5": None, "2.28125": "int2-g64-z"}
MEASURES = {
    "trace": ["measure.use=trace", "measure.weigh=error", "measure.hessian=attn-in"],
    "error": ["measure.use=error"],
    "fisher": [],
    "fisher token": ["measure.form=token"],
    "delta": ["measure.use=delta"],
    "kl": ["measure.use=kl", "measure.windows=2"],
}
MODES = ("layer", "attn-in", "attn-kron", "blend")


def changes(texts: Sequence[str]) -> list[str]:
    """--set KEY=VALUE for each; another measure forgets the options of the recipe's own."""
    return [word for text in texts for word in ("--set", text)]


def scores_file(scratch: Path, name: str) -> Path:
    return scratch / f"{name.replace(' ', '-')}.json"


def table(scratch: Path) -> Iterator[Job]:
    for size, grid in SIZES.items():
        if grid:
            yield f"uniform {grid}", ["--grid", grid]
        for name, texts in MEASURES.items():
            file = scores_file(scratch, name)
            words = ["--budget", f"{size}bpw", "--scores", str(file), *changes(texts)]
            yield f"{name} + milp {size}", words
    # the published rule counts bits of codes; with its scales these are as near below the sizes as
    # it can come (4 bits are its most)
    for size, codes in (("4.3125", 4.0), ("3.296875", 3.12), ("2.5", 2.33), ("2.28125", 2.11)):
        budget = ["--recipe", "aptq-paper", "--budget", f"{codes}bpw"]
        yield f"aptq-paper {codes} code bits ({size})", budget


def ablation() -> Iterator[Job]:
    """The Hessian of q, k, v and the weights of rows at uniform int3, without drift."""
    base = ["--grid", "int3-g64-z", "--set", "stage.0.drift=0.0"]
    for mode in MODES:
        for rows in ("uniform", "position", "gradient", "attention"):
            if rows == "attention" and mode != "layer":
                continue  # weights and sides are two readings of the same matrix
            kind = {"position": "uniform"}.get(rows, rows)
            words = [*base, "--set", f"stage.0.hessian={mode}", "--set", f"stage.0.rows={kind}"]
            if rows == "position":
                words += ["--set", "stage.0.first=0.03125"]
            yield f"int3 {mode} / {rows}", words


def seeds() -> Iterator[Job]:
    for seed in ("0", "1", "2"):
        for size in ("4.3125", "3.296875"):
            yield f"aptq {size}", ["--budget", f"{size}bpw", "--seed", seed]
        for drift in ("0.0", "0.25"):
            words = ["--grid", "int3-g64-z", "--set", f"stage.0.drift={drift}", "--seed", seed]
            yield f"int3 gradient rows, drift {drift}", words


def main() -> None:
    options = arguments(__doc__, ("table", "ablation", "seeds"))
    made = {"table": table(options.scratch), "ablation": ablation(), "seeds": seeds()}
    first = [
        scores(options, scores_file(options.scratch, name), *changes(texts))
        for name, texts in MEASURES.items()
    ]
    run(options, made, first)


if __name__ == "__main__":
    main()
