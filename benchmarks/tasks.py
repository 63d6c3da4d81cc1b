"""Zero-shot accuracy of the original and of smaller and smaller runs, on the same seeded items.

usage: python tasks.py MODEL --runs RUNS [--only bf16,int4]
RUNS keeps the run folders; one that is there is not made again.  Each model's right and wrong
answers are stored, so that later rows and other programs can pair them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import ours
import torch

MODELS: dict[str, dict[str, str]] = {  # label -> what the recipe is given
    "bf16": {},
    "int4": {"grid": "int4-g64-z"},
    "3.3bpw": {"budget": "3.3bpw"},
    "2.5bpw": {"budget": "2.5bpw"},
}
TASKS = ("arc_easy", "piqa")
PROTOCOL = (
    "lm-eval's prompts and metrics, no examples, no chat template; items drawn once by a seed and "
    "the same for all models; dequantised bf16 weights; ± standard error; seconds of the "
    "evaluation alone; right: 1 for each item that was answered correctly, in the items' order"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the yardstick")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--only", default=",".join(MODELS), help="labels, with commas")
    parser.add_argument("--limit", type=int, default=500, help="items of each task")
    parser.add_argument("--draw", type=int, default=0, help="seed of the items")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    ours.add_recipe_arguments(parser)
    return parser.parse_args()


def run_of(options: argparse.Namespace, label: str) -> tuple[Path, common.Row]:
    """The folder of a model, compressed if it is not there, and its sizes."""
    if not MODELS[label]:
        return options.model, {"bpw": 16.0, "checkpoint_bytes": None}
    from aptq.report import summary

    out = options.runs / label
    if not out.is_dir():
        options.runs.mkdir(parents=True, exist_ok=True)
        options.grid, options.budget = MODELS[label].get("grid"), MODELS[label].get("budget")
        known = sorted(options.runs.glob("*/scores.json"))  # measured once for all budgets
        scores = known[0] if known and options.budget else None
        ours.compress(options.model, out, ours.recipe_of(options), options.device, scores=scores)
    found = summary.read(out)
    return out, {"bpw": found.bits, "checkpoint_bytes": found.bytes_after}


def scored(
    options: argparse.Namespace, folder: Path, files: Sequence[Path], items: int
) -> common.Row:
    """Accuracies with standard errors, and the answers of each item as 0 and 1."""
    from transformers import AutoTokenizer

    from aptq.evaluate import harness

    model = ours.dense(folder, options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    paths = [str(file) for file in files]
    began = time.perf_counter()
    scores = harness.score(model, tokenizer, paths, limit=items, seed=options.draw)
    row: common.Row = {"seconds": round(time.perf_counter() - began, 1)}
    for one in scores:
        name = f"{one.task} {one.metric}"
        row[name] = {"value": round(one.value, 5), "stderr": round(one.stderr or 0.0, 5)}
        row[name]["right"] = "".join(str(int(value)) for value in one.values)
    return row


def against(row: common.Row, base: common.Row) -> dict[str, Any]:
    """Paired differences from the original, metric by metric."""
    from aptq.evaluate.intervals import paired

    found = {}
    for name, one in row.items():
        if isinstance(one, dict) and "right" in one:
            pair = [[float(sign) for sign in some[name]["right"]] for some in (row, base)]
            found[name] = {
                key: round(value, 5) if isinstance(value, float) else value
                for key, value in asdict(paired(*pair)).items()
            }
    return found


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    name = f"tasks-{options.device.split(':')[0]}"
    results = common.Results.open(
        name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    digest = common.sha256_model(options.model)
    files = [options.shared / "data" / "tasks" / f"{name}.jsonl" for name in TASKS]
    for label in options.only.split(","):
        row: common.Row = {"model_sha256": digest, "label": label, "items": options.limit}
        row |= {"seed": options.draw}
        if results.find(row):
            print(f"{label}: already in {results.path.name}")
            continue
        folder, sizes = run_of(options, label)
        row |= sizes | scored(options, folder, files, options.limit)
        base = results.find(row | {"label": "bf16"})
        if base:
            row["against bf16"] = against(row, base)
        for key, one in row.items():
            if isinstance(one, dict) and "right" in one:
                print(f"{label}: {key} {one['value']:.4f} ± {one['stderr']:.4f}", flush=True)
        print(f"{label}: {row['seconds']} s", flush=True)
        results.append(row)


if __name__ == "__main__":
    main()
