"""What interruptions cost: random kills, a disk that fills, memory that runs out, and the price.

usage: python kills.py [--only kills,disk,memory,soak] [--count 100]
       python kills.py --only overhead --model FOLDER [--pairs 3] [--words "--recipe gptq ..."]
kills, disk, memory: a random llama of 3 blocks, each row one interrupted job: what was done before
and after, and whether its files are those of the uninterrupted job.  soak: one process compresses,
verifies and loads again and again; memory after each cycle.  overhead: --model with and without
state, alternating.  Finished rows are skipped; one seed makes the moments.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.REPOSITORY))

from tests.killing import Server, hashes, recipe
from tests.tiny import TINY, _config, tiny_model

Add = Callable[[common.Row], None]
BUDGET = ["--budget", "3.5bpw"]
PROTOCOL = (
    "kills: SIGKILL at a random time after a random write of the job, then resume; "
    "disk: a small tmpfs is filled at a random step, emptied, the job run again; memory: RLIMIT_AS "
    "from a random step on; equal = SHA-256 of checkpoint/*, plan.json, scores.json; repeated = "
    "most blocks done again by one interruption; soak: memory after each cycle; overhead: "
    "seconds of compress with state over those without, alternating, one process each; "
    "saving = seconds of the former in which state was written"
)


def job(folder: Path, out: Path) -> list[str | Path]:
    words: list[str | Path] = ["compress", folder / "deep", "--out", out, *BUDGET]
    return [*words, "--recipe", recipe("plain", folder)]


def kills(folder: Path, add: Add, rows: range, seed: int) -> None:
    """Rows of jobs that were killed while they had something to lose, and then taken up."""
    with Server() as server:
        full = server.ask(*job(folder, folder / "full"))
        wanted = hashes(folder / "full")
        for number in rows:
            generator = random.Random(f"{seed} {number}")
            out, answers = folder / f"kill-{number}", list[dict[str, Any]]()
            while not out.exists():
                at = generator.randint(1, len(full["steps"]))
                after = generator.uniform(0, 2 * full["seconds"] / len(full["steps"]))
                how = {} if answers else {"at": at, "after": after}
                answers.append(server.ask(*job(folder, out), **how))
                if answers[0]["code"] == 0:  # it was faster: another moment
                    shutil.rmtree(out)
                    answers.clear()
            add({"kind": "kill", "number": number, **told(out, answers, wanted)})


def told(out: Path, answers: list[dict[str, Any]], wanted: dict[str, str]) -> dict[str, Any]:
    """What one job with its interruptions has come to."""
    done = [set(answer["blocks"]) for answer in answers]
    repeated = [len(one & two) for one, two in pairwise(done)]
    return {
        "codes": [answer["code"] for answer in answers],
        "blocks": [answer["blocks"] for answer in answers],
        "repeated": max(repeated, default=0),
        "equal": hashes(out) == wanted,
    }


def shortages(folder: Path, add: Add, rows: range, seed: int, kind: str) -> None:
    """Rows of jobs whose disk is full or whose memory is gone from a random step on."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    with Server((disk, 8 << 20) if kind == "disk" else None) as server:
        full = server.ask(*job(folder, disk / "full"), hash=str(disk / "full"))
        for number in rows:
            generator = random.Random(f"{seed} {number}")
            out = disk / f"{kind}-{number}"
            place = generator.randint(1, len(full["steps"]))
            how: dict[str, Any] = {"full": place, "fill": str(disk)}
            if kind == "memory":
                how = {"tight": place, "memory": generator.choice((0, 1, 4)) << 20}
            first = server.ask(*job(folder, out), **how)
            free = {"remove": str(disk / "filler")} if kind == "disk" else {}
            answers = [first]
            if first["code"] != 0:
                answers.append(server.ask(*job(folder, out), hash=str(out), **free))
            else:
                answers.append(server.ask("list", hash=str(out), **free))
            relieved = "going on with" in first["output"]
            row = {"kind": kind, "number": number, "step": full["steps"][place - 1]}
            row |= {"codes": [answer["code"] for answer in answers], "relieved": relieved}
            row["repeated"] = len({*first["blocks"]} & {*answers[1]["blocks"]})
            add({**row, "equal": answers[1]["hashes"] == full["hashes"]})


def soak(folder: Path, add: Add, rows: range) -> None:
    """Rows of one process that compresses, verifies and loads: its anonymous memory each time."""
    import psutil
    import torch

    from aptq import pipeline
    from aptq.recipe import Recipe
    from aptq.runtime.load import load
    from aptq.store.checkpoint import Checkpoint

    chosen = Recipe.load(recipe("plain", folder)).adapt(budget="3.5bpw")
    for number in rows:
        out = folder / "soak"
        pipeline.compress(folder / "deep", out, recipe=chosen)
        Checkpoint.open(out).verify()
        model = load(out)
        logits = model(torch.zeros(1, 8, dtype=torch.int64)).logits
        assert torch.isfinite(logits).all()
        del model, logits
        gc.collect()
        shutil.rmtree(out)
        held = psutil.Process().memory_info()
        anonymous = held.rss - held.shared
        add({"kind": "soak", "number": number, "anonymous": anonymous, "rss": held.rss})


def overhead(model: Path, add: Add, rows: range, words: list[str]) -> None:
    """Pairs of runs with state and without, one process each, order swapped in every second."""
    for number in rows:
        found: dict[str, Any] = {}
        for state in (True, False) if number % 2 else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                call = [sys.executable, __file__, "--one", str(state), folder, str(model), *words]
                done = subprocess.run(call, capture_output=True, text=True, check=True)
            found["with" if state else "without"] = json.loads(done.stdout.splitlines()[-1])
        seconds = [found[key]["seconds"] for key in ("with", "without")]
        processor = [found[key]["processor"] for key in ("with", "without")]
        ratios = {
            "ratio": round(seconds[0] / seconds[1], 4),
            "ratio_cpu": round(processor[0] / processor[1], 4),
        }
        row = {"kind": "overhead", "number": number, "words": " ".join(words)}
        add({**row, **found, **ratios, "load": os.getloadavg()[0]})


def one(state: str, folder: str, model: str, *words: str) -> None:
    """One timed run in this process; without state nothing of a journal is written or read."""
    from aptq import pipeline
    from aptq.engine.keeper import Keeper
    from aptq.recipe import Recipe
    from aptq.store.objects import Journal

    saving, save = [0.0, 0.0], Keeper.save

    def timed(keeper: Keeper, block: int) -> None:
        began, processor = time.perf_counter(), time.process_time()
        save(keeper, block)
        saving[0] += time.perf_counter() - began
        saving[1] += time.process_time() - processor

    setattr(Keeper, "save", timed)  # noqa: B010
    if state == "False":
        for name in ("publish", "put"):
            setattr(Journal, name, lambda *_: None)
    options = dict(zip(words[::2], words[1::2], strict=True))
    chosen = Recipe.load(options["--recipe"]).adapt(
        grid="int4-g64-z",
        samples=int(options["--samples"]),
        length=int(options["--length"]),
        source=options.get("--data"),
    )
    began, processor = time.perf_counter(), time.process_time()
    pipeline.compress(model, Path(folder) / "run", recipe=chosen)
    found = {"seconds": time.perf_counter() - began, "processor": time.process_time() - processor}
    found |= {"saving": saving[0], "saving_processor": saving[1]}
    print(json.dumps({key: round(value, 3) for key, value in found.items()}))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        return one(*sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="kills,disk,memory,soak")
    parser.add_argument(
        "--count", type=int, default=100, help="kills; a fifth and half of the rest"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="for the overhead")
    parser.add_argument("--words", default="--recipe gptq --samples 8 --length 256")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    results = common.Results.open(
        "kills-cpu", device="cpu", protocol=PROTOCOL, folder=options.results
    )
    only, count, seed = options.only.split(","), options.count, options.seed

    def rows(kind: str, number: int) -> range:
        """Numbers of the rows of a kind that are missing."""
        return range(sum(row["kind"] == kind for row in results.rows), number)

    def add(row: common.Row) -> None:
        print(row, flush=True)
        results.append({"label": f"{row['kind']} {row['number']}", "seed": seed, **row})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        TINY["deep"] = lambda: _config("llama", num_hidden_layers=3)
        tiny_model("deep", folder)
        if "kills" in only:
            kills(folder, add, rows("kill", count), seed)
        for kind in {"disk", "memory"} & set(only):
            shortages(folder, add, rows(kind, count // 5), seed, kind)
        if "soak" in only:
            soak(folder, add, rows("soak", count // 2))
        if "overhead" in only:
            overhead(options.model, add, rows("overhead", options.pairs), options.words.split())
    return None


if __name__ == "__main__":
    main()
