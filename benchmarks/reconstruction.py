"""Tables of the reconstruction: aptq-max, each stage alone, what its steps add, and aptq-fast.

usage: python reconstruction.py MODEL --device cuda --gpus 4 --scratch FOLDER [--only max alone]
Every row is a process of quality.py; finished rows are skipped, so the tables fill up over several
calls, also on machines with fewer GPUs.  Seconds are timings only with one worker a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import common
import tomli_w

HERE = Path(__file__).resolve().parent
SHIPPED = common.REPOSITORY / "src" / "aptq" / "recipes"
SIZES = {"4.3125": (0,), "3.296875": (0, 1, 2), "2.5": (0,), "2.28125": (0, 1, 2)}  # bpw: seeds
GRIDS = ("int4-g64-z", "int3-g64-z", "int2-g64-z")
PASSES = 1600  # windows that go through a block: AutoRound's 200 steps of 8
EPOCHS = 12.0  # of tuning the whole model on the text alone: 130 steps of 8 windows
# EfficientQAT: 4,096 windows twice; AutoRound's recipe for its best quality: 1,000 steps of 8
OWN = {"efficientqat": 1024, "autoround": 1000}
FEW = ["int2-g64-z", "int2-g32-z", "int3-g64-z", "int3-g32-z", "int4-g64-z", "int6-g64-z"]
LAYERWISE = ("descent", "adaquant")  # they see Hessians: no window passes
TUNING = ("autoround", "omniquant", "affinequant", "cbq", "tesseraq", "efficientqat")
TUNING += ("norm_tweaking", "bias_tuning", "e2e_qp")  # the last two: passes of all blocks together
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


def largest(scratch: Path) -> Iterator[Job]:
    """aptq-max as shipped, and on the windows of the text alone."""
    recipes = {"aptq-max": ["--recipe", "aptq-max"]}
    recipes["aptq-max, text only"] = written(scratch, "max text", text_only(shipped("aptq-max")))
    for name, recipe in recipes.items():
        for size, seeds in SIZES.items():
            for seed in seeds:
                yield f"{name} {size}", [*recipe, "--budget", f"{size}bpw", "--seed", str(seed)]


def tuning(name: str) -> Table:
    """The stage with its own defaults, but so many steps that PASSES windows pass each block."""
    batch = 1 if name == "norm_tweaking" else 8  # the paper's step is a window
    blocks = 2 if name == "cbq" else 1  # a block is in so many windows of blocks
    table: Table = {"use": name, "steps": PASSES // (batch * blocks), "batch": batch}
    return table | ({"blocks": blocks} if blocks > 1 else {})


def behind(gptq: Table, name: str) -> Table:
    """A layerwise stage that goes by the Hessian and the target of the `gptq` before."""
    return {"use": name} | {key: gptq[key] for key in ("rows", "drift") if key in gptq}


def alone(scratch: Path) -> Iterator[Job]:
    """Every stage from nearest rounding, and behind the gptq of the default recipe."""
    gptq = shipped("aptq")["stage"][0]
    found: dict[str, list[Table]] = {"rtn": [{"use": "rtn"}], "gptq": [{"use": "gptq"}]}
    found["gptq of aptq"] = [gptq]
    for name in (*LAYERWISE, *TUNING):
        local = name in LAYERWISE
        found[f"{name}, from nearest"] = [{"use": name} if local else tuning(name)]
        found[f"{name}, behind gptq"] = [gptq, behind(gptq, name) if local else tuning(name)]
    for grid in GRIDS[1:]:
        for name, stages in found.items():
            recipe = written(scratch, f"alone {name}", {"stage": stages})
            yield f"{grid[:4]} {name}", [*recipe, "--grid", grid]


def text_only(recipe: Table) -> Table:
    """No windows that the model writes, and so many epochs that it learns the text's by heart."""
    epochs = {"epochs": EPOCHS}
    stages = [stage | (epochs if "epochs" in stage else {}) for stage in recipe["stage"]]
    return recipe | {"data": recipe["data"] | {"written": 0}, "stage": stages}


def steps(scratch: Path, scores: Path) -> Iterator[Job]:
    """What the stages of aptq-max add on the text alone; all of them are rows of `largest`."""
    recipe = text_only(shipped("aptq-max"))
    gptq, blocks, whole = recipe["stage"]
    chosen = [[gptq], [gptq, blocks], [gptq, whole], [gptq, behind(gptq, "descent"), blocks, whole]]
    for size in SIZES:
        for stages in chosen:
            name, table = " + ".join(x["use"] for x in stages), recipe | {"stage": stages}
            words = written(scratch, f"steps {name}", table)
            yield (
                f"steps {size}: {name}",
                [*words, "--budget", f"{size}bpw", "--scores", str(scores)],
            )


def own(scratch: Path) -> Iterator[Job]:
    """The two best alone at the effort of their papers, in windows that pass a block."""
    for name, count in OWN.items():
        stages = [tuning(name) | {"steps": count}]
        recipe = written(scratch, f"own {name}", {"stage": stages})
        for grid in GRIDS[1:]:
            yield f"{grid[:4]} {name}, {count} steps", [*recipe, "--grid", grid]


def again(scratch: Path) -> Iterator[Job]:
    """Does it pay to choose bits by the errors that reconstruction leaves?"""
    recipe = text_only(shipped("aptq-max")) | {"grids": FEW}
    for tuned in (False, True):
        table = recipe | {"measure": recipe["measure"] | {"tuned": tuned}}
        words = written(scratch, f"again {int(tuned)}", table)
        name = "after reconstruction" if tuned else "before it"
        yield f"plan by errors {name} 2.5", [*words, "--budget", "2.5bpw"]


def fast() -> Iterator[Job]:
    for recipe in ("aptq-fast", "fast"):
        for grid in GRIDS:
            yield f"{recipe} {grid}", ["--recipe", recipe, "--grid", grid]


def jobs(options: argparse.Namespace, scores: Path) -> Iterator[Job]:
    """Rows that are asked for, as commands."""
    scratch = options.scratch
    made = {"max": largest(scratch), "alone": alone(scratch), "fast": fast()}
    made |= {"steps": steps(scratch, scores), "own": own(scratch), "again": again(scratch)}
    name = options.name or f"reconstruction-{options.device.split(':')[0]}"
    rows = ["--results", str(options.results), "--texts", "all", "--name", name]
    for part in options.only:
        for label, more in made[part]:
            if re.search(options.match, label):
                fixed = ["quality.py", str(options.model), "--label", label]
                yield label, [*fixed, *protocol(options), *rows, *more]


def protocol(options: argparse.Namespace) -> list[str]:
    """Words that all programs get."""
    words = ["--device", options.device, "--shared", str(options.shared)]
    return [*words, "--samples", options.samples, "--length", options.length]


class Workers:
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

    def run_all(self, chosen: Sequence[Job]) -> None:
        """Print a line for each as it ends."""
        with ThreadPoolExecutor(self.count) as pool:
            waiting = {pool.submit(self.run, words): label for label, words in chosen}
            for done in as_completed(waiting):
                print(f"{waiting[done]}: {done.result()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--name", help="result file; default: reconstruction-DEVICE")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for recipes and scores")
    parser.add_argument("--gpus", type=int, default=0, help="0 = as the environment has it")
    parser.add_argument("--workers", type=int, default=0, help="0 = one for each of --gpus")
    parser.add_argument("--samples", default="96")
    parser.add_argument("--length", default="2048")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after these")
    parts = ("max", "alone", "steps", "own", "again", "fast")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--match", default="", help="rows whose label has this pattern")
    parser.add_argument("--list", action="store_true", help="print the rows, run nothing")
    options = parser.parse_args()
    for name in ("model", "shared", "results", "scratch"):  # rows run in another folder
        setattr(options, name, getattr(options, name).resolve())
    options.scratch.mkdir(parents=True, exist_ok=True)
    scores = options.scratch / "scores-aptq-max.json"
    chosen = list(jobs(options, scores))
    if options.list:
        for label, words in chosen:
            print(f"{label}\n    {shlex.join(words)}")
        return
    workers = Workers(options)
    if not scores.exists() and any(str(scores) in words for _, words in chosen):
        measure = ["scores.py", str(options.model), str(scores), *protocol(options)]
        print(f"scores: {workers.run([*measure, '--recipe', 'aptq-max'])}", flush=True)
    workers.run_all(chosen)


if __name__ == "__main__":
    main()
