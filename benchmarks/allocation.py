"""Tables of the allocation: sizes x measures at equal bytes, and Hessians x row weights at int3.

usage: python allocation.py MODEL --device cuda --workers 5 [--only table ablation seeds]
Every row is a process of quality.py, several at a time (so their seconds are no timings); finished
rows are skipped.  A measure is taken once and its scores serve all sizes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

HERE = Path(__file__).resolve().parent
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
Job = tuple[str, list[str]]  # label, words behind quality.py MODEL --label LABEL


def changes(texts: Sequence[str]) -> list[str]:
    """--set KEY=VALUE for each; another measure forgets the options of the recipe's own."""
    return [word for text in texts for word in ("--set", text)]


def table(scores: Path) -> Iterator[Job]:
    for size, grid in SIZES.items():
        if grid:
            yield f"uniform {grid}", ["--grid", grid]
        for name, texts in MEASURES.items():
            file = scores / f"{name.replace(' ', '-')}.json"
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


def run(words: Sequence[str], limit: float) -> str:
    """One process; its last line, or what went wrong."""
    if time.monotonic() > limit:
        return "skipped: out of time"
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=HERE
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return " | ".join(lines[-4:])


def measure(options: argparse.Namespace, common_words: Sequence[str], limit: float) -> list[Job]:
    """Processes that write the scores which are not there yet."""
    jobs = []
    for name, texts in MEASURES.items():
        file = options.scratch / f"{name.replace(' ', '-')}.json"
        if not file.exists():
            words = ["scores.py", str(options.model), str(file), *common_words, *changes(texts)]
            jobs.append((name, words))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for scores")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--samples", default="96")
    parser.add_argument("--length", default="2048")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after these")
    parts = ("measure", "table", "ablation", "seeds")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--match", default="", help="rows whose label has this pattern")
    options = parser.parse_args()
    for name in ("model", "shared", "results", "scratch"):  # rows run in another folder
        setattr(options, name, getattr(options, name).resolve())
    options.scratch.mkdir(parents=True, exist_ok=True)
    limit = time.monotonic() + options.seconds
    words = ["--device", options.device, "--shared", str(options.shared)]
    words += ["--samples", options.samples, "--length", options.length]
    rows = ["--results", str(options.results), "--texts", "all", "--name"]
    jobs: list[Job] = []
    if "measure" in options.only:
        jobs += measure(options, words, limit)
    made = {"table": table(options.scratch), "ablation": ablation(), "seeds": seeds()}
    for part in (part for part in parts[1:] if part in options.only):
        name = f"allocation-{options.device.split(':')[0]}"
        for label, more in made[part]:
            fixed = ["quality.py", str(options.model), "--label", label, *words, *rows, name]
            jobs.append((label, [*fixed, *more]))
    with ThreadPoolExecutor(options.workers) as pool:
        chosen = [job for job in jobs if re.search(options.match, job[0])]
        for (label, _), line in zip(
            chosen, pool.map(lambda job: run(job[1], limit), chosen), strict=True
        ):
            print(f"{label}: {line}", flush=True)


if __name__ == "__main__":
    main()
