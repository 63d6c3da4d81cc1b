"""Does calibrating on a task's text help that task?  TaCQ's circuits (arXiv:2504.07389) on PIQA.

usage: python conditioned.py MODEL --runs RUNS [--only LABELS] [--grid int3-row-z+o0.35%]
Half of the items, each with its right answer, is the task's text; the other half is asked.  General
text is C4, as many tokens of it.  Rows hold every answer, so that differences are paired.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import common
import ours
import tasks

LABELS = {  # label -> (stages, is the text the task's?); none: the original
    "bf16": ([], False),
    "gptq, general": (["gptq"], False),
    "gptq, task": (["gptq"], True),
    "tacq, general": (["tacq", "gptq"], False),
    "tacq, task": (["tacq", "gptq"], True),
}
TEXT = "task.txt"
PROTOCOL = (
    "PIQA's validation items split in two by a seed: questions with right answers of the first "
    "half are the task's text, the second half is asked as in tasks.py; gptq as in recipe aptq; "
    "'against general' = paired difference from the same stages on C4"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the yardstick")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders and texts")
    parser.add_argument("--only", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--items", type=int, default=1 << 20, help="asked at most")
    parser.add_argument("--draw", type=int, default=0, help="seed of the split")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    ours.add_recipe_arguments(parser)
    return parser.parse_args()


def split(options: argparse.Namespace) -> tuple[Path, Path]:
    """The task's text, and the file of the items that are asked."""
    file = options.shared / "data" / "tasks" / "piqa.jsonl"
    items = file.read_text("utf-8").splitlines()
    random.Random(options.draw).shuffle(items)
    half = len(items) // 2
    text, asked = options.runs / TEXT, options.runs / "piqa_asked.jsonl"
    known = [json.loads(item) for item in items[:half]]
    lines = [f"{item['question']} {item['choices'][item['label']]}" for item in known]
    text.write_text("\n".join(lines) + "\n", "utf-8")
    asked.write_text("\n".join(items[half:]) + "\n", "utf-8")
    return text, asked


def compressed(options: argparse.Namespace, label: str, text: Path) -> tuple[Path, common.Row]:
    """The folder of a model, made if it is not there, and its size."""
    from parts import stages
    from rows import written

    from aptq.report import summary

    names, own = LABELS[label]
    out = options.runs / label.replace(", ", "-")
    if not out.is_dir():
        known = stages()
        options.recipe = written(options.runs, label, {"stage": [known[n] for n in names]})[1]
        spec = options.grid if "tacq" in names else options.grid.partition("+")[0]
        chosen = argparse.Namespace(**{**vars(options), "grid": spec})
        chosen.text = text if own else options.text
        ours.compress(options.model, out, ours.recipe_of(chosen), options.device)
    return out, {"bpw": summary.read(out).bits}


def identity(options: argparse.Namespace, label: str) -> common.Row:
    """What finds the row of `label`."""
    names, own = LABELS[label]
    held = {"file": TEXT if own else "c4_calibration.txt", "window": options.length}
    held["tokens"] = options.samples * options.length
    row: common.Row = {"model_sha256": common.sha256_model(options.model)}
    row |= {"label": f"{options.grid} {label}", "seed": options.draw}
    return row | {"calibration": held if names else None}


def main() -> None:
    options = arguments()
    options.grid = options.grid or "int3-row-z+o0.35%"
    options.runs.mkdir(parents=True, exist_ok=True)
    text, asked = split(options)
    name = f"conditioned-{options.device.split(':')[0]}"
    results = common.Results.open(
        name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    for label in options.only:
        row = identity(options, label)
        if results.find(row):
            print(f"{label}: already in {results.path.name}")
            continue
        folder, sizes = options.model, {"bpw": 16.0}
        if LABELS[label][0]:
            folder, sizes = compressed(options, label, text)
        row |= sizes | tasks.scored(options, folder, [asked], options.items)
        for other, base in (("bf16", "bf16"), ("general", label.replace("task", "general"))):
            found = results.find(identity(options, base))
            if found and base != label:
                row[f"against {other}"] = tasks.against(row, found)
        results.append(row)
        print({key: one for key, one in row.items() if key.startswith("against") or key == "bpw"})


if __name__ == "__main__":
    main()
