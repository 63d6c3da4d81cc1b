"""Compress time against llm-compressor: same model, tokens, grid; alternating processes.

usage: python compress_time.py MODEL --peer-python VENV/bin/python --pairs 3 [--profile]
       python compress_time.py MODEL --linear 3    ours alone: 6, 12, 24 blocks; 8, 16, 32 windows
A call of ours reads, compresses and writes; theirs is `oneshot` (reads, compresses), saving timed
apart.  The load average before each run shows whether the machine was idle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import ours

HERE = Path(__file__).resolve().parent
RATIOS = ("ratio", "ratio_saved", "ratio_cpu", "ratio_process")
PROTOCOL = (
    "pairs of processes, one after the other, order swapped in every second pair; "
    "ratio = ours / theirs, of calls: "
    "ours includes writing the checkpoint, theirs does not (ratio_saved: both do); "
    "ratio_cpu = of the processor seconds of these calls, all threads"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", type=Path, help="python of llm-compressor's environment")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--profile", action="store_true", help="one more run of ours, under a profiler"
    )
    parser.add_argument(
        "--linear", type=int, default=0, metavar="TURNS", help="cost by blocks and by tokens"
    )
    parser.add_argument("--label", default="")
    parser.add_argument("--name", help="result file; default compress_time-DEVICE")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    ours.add_recipe_arguments(parser)
    return parser.parse_args()


def timed(words: list[str]) -> dict[str, Any]:
    """Run a program that prints a JSON report; add its process's seconds and the load before."""
    load = os.getloadavg()[0]
    start = time.perf_counter()
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    return common.last_json(done.stdout, words) | {"process": round(seconds, 3), "load": load}


def run_ours(options: argparse.Namespace, folder: Path, *extra: str) -> dict[str, Any]:
    words = [sys.executable, str(HERE / "ours.py"), str(options.model), str(folder / "run"), *extra]
    words += ["--recipe", options.recipe, "--grid", options.grid, "--seed", str(options.seed)]
    for change in options.changes:
        words += ["--set", change]
    return timed(words + shared_words(options))


def shortened(model: Path, blocks: int, folder: Path) -> Path:
    """A copy of `model` with its first blocks only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    short = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if blocks >= len(short.model.layers):
        raise SystemExit(f"{model} has {len(short.model.layers)} blocks, {blocks} are asked for")
    short.model.layers = short.model.layers[:blocks]
    short.config.num_hidden_layers = blocks
    if short.config.to_dict().get("layer_types"):
        short.config.layer_types = short.config.layer_types[:blocks]
    short.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def measure_linear(options: argparse.Namespace, results: common.Results) -> None:
    """Seconds of a call by blocks (at all windows) and by windows (at 24 blocks), in turns.

    One row: medians of every point, and of each line its slope, intercept and greatest deviation.
    """
    row: common.Row = {"label": f"linear {options.recipe} {options.grid}", "seed": options.seed}
    row["model_sha256"] = common.sha256_model(options.model)
    if results.find(row):
        print(f"{row['label']}: already in {results.path.name}")
        return
    most = options.samples
    points = [(6, most), (12, most), (24, most), (24, most // 4), (24, most // 2)]
    found: dict[tuple[int, int], list[dict[str, Any]]] = {point: [] for point in points}
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(scratch)
        models = {n: shortened(options.model, n, folder / str(n)) for n in (6, 12, 24)}
        for turn in range(options.linear):
            for blocks, samples in points[:: 1 if turn % 2 == 0 else -1]:
                some = argparse.Namespace(**vars(options))
                some.model, some.samples = models[blocks], samples
                with tempfile.TemporaryDirectory(dir=".") as out:
                    report = run_ours(some, Path(out))
                found[blocks, samples].append(report)
                print(f"{blocks} blocks, {samples} windows: {report['seconds']} s", flush=True)
    row["points"] = [
        {
            "blocks": blocks,
            "tokens": samples * options.length,
            "seconds": [report["seconds"] for report in reports],
            "cpu_seconds": [report["cpu_seconds"] for report in reports],
            "peak_bytes": max(report["peak_bytes"] for report in reports),
        }
        for (blocks, samples), reports in found.items()
    ]
    row["by_blocks"] = line([p for p in row["points"] if p["tokens"] == most * options.length], 0)
    row["by_tokens"] = line([p for p in row["points"] if p["blocks"] == 24], 1)
    results.append(row)
    print({key: row[key] for key in ("by_blocks", "by_tokens")})


def line(points: list[dict[str, Any]], which: int) -> dict[str, float]:
    """Least squares of the median processor seconds over blocks (0) or tokens (1)."""
    import numpy as np

    x = np.array([point[("blocks", "tokens")[which]] for point in points], dtype=float)
    y = np.array([statistics.median(point["cpu_seconds"]) for point in points])
    slope, start = np.polyfit(x, y, 1)
    worst = np.abs(start + slope * x - y).max() / y.max()
    return {"slope": float(slope), "intercept": float(start), "deviation": float(worst)}


def run_theirs(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from aptq.core.grid import Grid

    grid = Grid.parse(options.grid)
    words = [
        str(options.peer_python),
        str(HERE / "peers" / "llm_compressor.py"),
        str(options.model),
    ]
    words += [
        "--bits",
        str(grid.bits),
        "--group",
        str(grid.group),
        "--packed",
        str(folder / "packed"),
    ]
    words += ["--symmetric"] if grid.zero == "none" else []
    return timed(words + shared_words(options))


def shared_words(options: argparse.Namespace) -> list[str]:
    text = options.text or options.shared / "data" / "c4_calibration.txt"
    words = [
        "--text",
        str(text),
        "--samples",
        str(options.samples),
        "--length",
        str(options.length),
    ]
    return [*words, "--device", options.device, "--threads", str(options.threads)]


def pair(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """One run of each, ours first in even pairs."""
    reports: dict[str, dict[str, Any]] = {}
    for who in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
        with tempfile.TemporaryDirectory() as scratch:
            call = run_ours if who == "ours" else run_theirs
            reports[who] = call(options, Path(scratch))
    mine, peer = reports["ours"], reports["theirs"]
    oneshot, save = peer["seconds"]["oneshot"], peer["seconds"]["save"]
    row = {
        "ours": {
            key: mine[key] for key in ("seconds", "cpu_seconds", "process", "peak_bytes", "load")
        },
        "theirs": peer["seconds"]
        | {key: peer[key] for key in ("process", "peak_rss_bytes", "peak_cuda_bytes", "load")},
        "ratio": round(mine["seconds"] / oneshot, 4),
        "ratio_saved": round(mine["seconds"] / (oneshot + save), 4),
        "ratio_cpu": round(mine["cpu_seconds"] / peer["seconds"]["oneshot_cpu"], 4),
        "ratio_process": round(mine["process"] / peer["process"], 4),
    }
    print(f"pair {number + 1}: {row}", flush=True)
    return row | {"peer_versions": peer["versions"], "threads": [mine["threads"], peer["threads"]]}


def main() -> None:
    options = arguments()
    name = options.name or f"compress_time-{options.device.split(':')[0]}"
    results = common.Results.open(
        name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    if options.linear:
        measure_linear(options, results)
        return
    recipe = ours.recipe_of(options)
    row: common.Row = {
        "model_sha256": common.sha256_model(options.model)
    }  # also fills the page cache
    row |= {"label": options.label or f"{options.recipe} {options.grid}", "seed": options.seed}
    row |= {"calibration": ours.calibration_of(recipe), "recipe_sha256": ours.sha256_recipe(recipe)}
    if results.find(row):
        print(f"{row['label']}: already in {results.path.name}")
        return
    if options.pairs and not options.peer_python:
        raise SystemExit(
            "--peer-python is needed to run llm-compressor (see peers/requirements-*.txt)"
        )
    pairs = [pair(options, number) for number in range(options.pairs)]
    if pairs:
        row["peer_versions"] = pairs[0].pop("peer_versions")
        for kind in RATIOS:
            row[f"{kind}_median"] = statistics.median(one[kind] for one in pairs)
    row["pairs"] = [{k: v for k, v in one.items() if k != "peer_versions"} for one in pairs]
    if options.profile:
        with tempfile.TemporaryDirectory() as scratch:
            row["profile"] = run_ours(options, Path(scratch), "--profile")["profile"]
    results.append(row)
    print({key: value for key, value in row.items() if key.endswith("median")})


if __name__ == "__main__":
    main()
