"""What scripts of whole tables share: every row is a process of quality.py, several at a time.

Finished rows are skipped, so tables fill up over several calls, also on machines with fewer GPUs.
Seconds of rows are timings only with one worker a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import common
import tomli_w

HERE = Path(__file__).resolve().parent
SHIPPED = common.REPOSITORY / "src" / "aptq" / "recipes"
Job = tuple[str, list[str]]  # label, words behind quality.py MODEL --label LABEL
Table = dict[str, Any]


def shipped(name: str) -> Table:
    """A shipped recipe as it is written."""
    return tomllib.loads((SHIPPED / f"{name}.toml").read_text("utf-8"))


def written(scratch: Path, name: str, table: Table) -> list[str]:
    """--recipe and the file that the recipe was written to."""
    path = scratch / f"{re.sub(r'[^a-z0-9_]+', '-', name)}.toml"
    path.write_text(tomli_w.dumps(table), "utf-8")
    return ["--recipe", str(path)]


def behind(gptq: Table, name: str) -> Table:
    """A layerwise stage that goes by the Hessian and the target of the `gptq` before."""
    return {"use": name} | {key: gptq[key] for key in ("rows", "drift") if key in gptq}


def arguments(text: str, parts: Sequence[str]) -> argparse.Namespace:
    """The options of a script whose tables are called `parts`; `text` is its docstring."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--name", help="result file; default: SCRIPT-DEVICE")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for recipes and scores")
    parser.add_argument("--gpus", type=int, default=0, help="0 = as the environment has it")
    parser.add_argument("--workers", type=int, default=0, help="0 = one for each of --gpus")
    parser.add_argument("--samples", default="96")
    parser.add_argument("--length", default="2048")
    parser.add_argument("--texts", default="all", help="as in quality.py")
    parser.add_argument("--limit", help="as in quality.py: windows of the first text")
    parser.add_argument("--limit-c4", help="as in quality.py: windows of the second text")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after these")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--match", default="", help="rows whose label has this pattern")
    parser.add_argument("--list", action="store_true", help="print the rows, run nothing")
    options = parser.parse_args()
    for name in ("model", "shared", "results", "scratch"):  # rows run in another folder
        setattr(options, name, getattr(options, name).resolve())
    options.name = options.name or f"{Path(sys.argv[0]).stem}-{options.device.split(':')[0]}"
    options.scratch.mkdir(parents=True, exist_ok=True)
    return options


def protocol(options: argparse.Namespace) -> list[str]:
    """Words that all programs get."""
    words = ["--device", options.device, "--shared", str(options.shared)]
    return [*words, "--samples", options.samples, "--length", options.length]


def scores(options: argparse.Namespace, out: Path, *more: str) -> Job:
    """The process that measures scores into a file which rows will name."""
    return out.stem, ["scores.py", str(options.model), str(out), *protocol(options), *more]


def run(
    options: argparse.Namespace, made: Mapping[str, Iterable[Job]], first: Sequence[Job] = ()
) -> None:
    """Run the rows of the tables that are asked for, and before them what they need of `first`.

    A job of `first` writes the file that is its third word, and is skipped where that is there.
    """
    rows = ["--results", str(options.results), "--name", options.name, "--texts", options.texts]
    for name in ("limit", "limit_c4"):
        if getattr(options, name) is not None:
            rows += [f"--{name.replace('_', '-')}", getattr(options, name)]
    chosen = [
        (label, ["quality.py", str(options.model), "--label", label, *protocol(options), *rows, *x])
        for part in options.only
        for label, x in made[part]
        if re.search(options.match, label)
    ]
    wanted = {word for _, words in chosen for word in words}
    first = [job for job in first if job[1][2] in wanted and not Path(job[1][2]).exists()]
    if options.list:
        for label, words in [*first, *chosen]:
            print(f"{label}\n    {shlex.join(words)}")
        return
    _Workers(options).run_all([*first, *chosen], {Path(job[1][2]) for job in first})


class _Workers:
    """Processes side by side, each worker's on a GPU of its own as far as there are enough."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.gpus, self.limit = options.gpus, time.monotonic() + options.seconds
        self.count = options.workers or max(options.gpus, 1)
        self.free: SimpleQueue[int] = SimpleQueue()
        for worker in range(self.count):
            self.free.put(worker)

    def run(self, words: Sequence[str]) -> str:
        """One process; its last lines, or what went wrong."""
        if time.monotonic() > self.limit:
            return "skipped: out of time"
        worker, began = self.free.get(), time.monotonic()
        gpu = {"CUDA_VISIBLE_DEVICES": str(worker % self.gpus)} if self.gpus else {}
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=HERE,
            env=os.environ | gpu,
        )
        self.free.put(worker)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        return " | ".join([f"{time.monotonic() - began:.0f} s", *lines[-4:]])

    def run_all(self, jobs: Sequence[Job], made: set[Path]) -> None:
        """Each as soon as its files of `made` are there, in order; print a line when it ends."""
        pending, busy, changed = list(jobs), 0, threading.Condition()

        def ready(job: Job) -> bool:
            # the job that writes a file names it too
            return all(path.exists() or job[1][2] == str(path) for path in made & _paths(job))

        def work() -> None:
            nonlocal busy
            while True:
                with changed:
                    while not (job := next(filter(ready, pending), None)) and busy:
                        changed.wait()
                    if job is None:
                        return  # none is left, or nobody is at work on what the others need
                    pending.remove(job)
                    busy += 1
                print(f"{job[0]}: {self.run(job[1])}", flush=True)
                with changed:
                    busy -= 1
                    changed.notify_all()

        threads = [threading.Thread(target=work) for _ in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for label, _ in pending:
            print(f"{label}: not run, its scores are missing", flush=True)


def _paths(job: Job) -> set[Path]:
    return {Path(word) for word in job[1]}
