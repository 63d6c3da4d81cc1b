"""One row of the quality table: compress the yardstick, or take a folder as it is; perplexity.

usage: python quality.py MODEL --label "gptq int3" --grid int3-g64-z --set stage.0.damp=0.02
       python quality.py MODEL --label bf16 --folder MODEL --bpw 16
`--texts validation` measures on the texts for choosing defaults, into a file of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import common
import ours
import torch

WINDOW = 2048
PROTOCOL = (
    "perplexity of the dequantised bf16 model: text tokenised whole, no special tokens, "
    "non-overlapping windows of 2048, mean NLL over 2047 predictions a window; "
    "NAME_firstN = only the first N windows"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the yardstick")
    parser.add_argument("--label", required=True)
    parser.add_argument("--name", help="result file; default: quality-DEVICE or validation-DEVICE")
    parser.add_argument("--texts", choices=(*ours.TEXTS, "all"), default="test")
    parser.add_argument("--limit", type=int, help="windows of the first (wiki) text; default all")
    parser.add_argument(
        "--limit-c4", type=int, help="windows of the second (C4) text; 0 = leave it out"
    )
    parser.add_argument(
        "--folder", type=Path, help="evaluate this dense folder instead of compressing"
    )
    parser.add_argument(
        "--report", type=Path, help="with --folder: JSON report of the peer that made it"
    )
    parser.add_argument("--bpw", type=float, help="with --folder: bits per weight")
    parser.add_argument("--out", type=Path, help="keep the run folder here")
    parser.add_argument(
        "--results", type=Path, default=common.RESULTS, help="folder of result files"
    )
    ours.add_recipe_arguments(parser)
    return parser.parse_args()


def texts(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Ids of each text, cut to its limit of windows, under a name that says so when it was cut."""
    found = {}
    wanted = ours.TEXTS.get(options.texts) or ours.TEXTS["test"] | ours.TEXTS["validation"]
    limits = (options.limit, options.limit_c4, None, None)
    for (name, file), limit in zip(wanted.items(), limits, strict=False):
        ids = ours.tokens(options.model, options.shared / "data" / file)
        if limit is None or limit >= len(ids) // WINDOW:
            found[name] = ids
        elif limit > 0:
            found[f"{name}_first{limit}"] = ids[: limit * WINDOW]
    return found


def measure(options: argparse.Namespace, folder: Path, ids: dict[str, torch.Tensor]) -> common.Row:
    """Perplexity on every text."""
    model = ours.dense(folder, options.device)
    found = {}
    for name, row in ids.items():
        result = ours.perplexity(model, row, options.device, window=WINDOW)
        found[name] = round(result.ppl, 4)
        print(f"{options.label}: {name} {result.ppl:.4f} over {result.windows} windows", flush=True)
    return found


def peer_row(options: argparse.Namespace) -> common.Row:
    """What is known of a folder that another tool made: from its report, and the bits given."""
    row: common.Row = {
        "ours": False,
        "bpw": options.bpw,
        "linear_bytes": None,
        "checkpoint_bytes": None,
    }
    row |= {"calibration": None, "recipe_sha256": None, "seconds": None, "peak_gib": None}
    if options.report:
        report = json.loads(options.report.read_text(encoding="utf-8"))
        peak = report["peak_cuda_bytes"] or report["peak_rss_bytes"]
        row |= {"calibration": report["calibration"], "seconds": report["seconds"]["oneshot"]}
        row |= {"checkpoint_bytes": report.get("packed_bytes"), "peak_gib": round(peak / 2**30, 3)}
    return row


def our_row(options: argparse.Namespace, recipe: Any, out: Path) -> common.Row:
    done = ours.compress(options.model, out, recipe, options.device, scores=options.scores)
    print(f"{options.label}: {done['bpw']:.4f} bpw in {done['seconds']} s", flush=True)
    done |= {"peak_gib": round(common.peak_bytes(options.device) / 2**30, 3)}
    tuned = ours.tuned_of(out)
    return done | ({"tuned": tuned} if tuned else {})


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    kind = "validation" if options.texts == "validation" else "quality"
    name = options.name or f"{kind}-{options.device.split(':')[0]}"
    results = common.Results.open(
        name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    row: common.Row = {"model_sha256": common.sha256_model(options.model), "label": options.label}
    ids = texts(options)
    row |= {"windows": len(next(iter(ids.values()))) // WINDOW, "seed": options.seed}
    recipe = None if options.folder else ours.recipe_of(options)
    if recipe:
        row |= {"ours": True, "calibration": ours.calibration_of(recipe)}
        row["recipe_sha256"] = ours.sha256_recipe(recipe)
    else:
        row |= peer_row(options)
    if results.find(row):
        print(f"{options.label}: already in {results.path.name}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder
        if recipe:
            folder = options.out or Path(scratch) / "run"
            row |= our_row(options, recipe, folder)
        row |= measure(options, folder, ids)
    results.append(row)


if __name__ == "__main__":
    main()
