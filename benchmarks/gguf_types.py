"""Plans of GGUF's types beside llama.cpp's own quantizer at the same bits.

usage: python gguf_types.py MODEL --scratch FOLDER --peer Q4_K_M.json=DENSE_FOLDER ...
Each peer is a report of peers/llamacpp.py and the dense folder that it wrote.  Ours gets exactly
its bits in the linears and the same 8 bits in the embedding; both are evaluated dequantised.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import ours
from quality import PROTOCOL, WINDOW

EMBEDDING = "int8-g32"  # Q8_0, which llama-quantize gives a tied embedding of 576 columns


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="REPORT=FOLDER")
    parser.add_argument("--scratch", type=Path, required=True, help="scores, run folders")
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8, help="windows of each text")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def scored(options: argparse.Namespace, recipe: Any) -> Any:
    """Scores of all of GGUF's types, measured once."""
    from aptq import pipeline
    from aptq.core.scores import Scores

    file = options.scratch / "scores-gguf.json"
    if not file.exists():
        pipeline.measure(options.model, file, recipe=recipe, device=options.device)
    return Scores.load(file)


def compressed(options: argparse.Namespace, recipe: Any, scores: Any, bits: float) -> Any:
    """(run folder, bytes of the exported file) of a plan with so many bits in the linears."""
    from aptq import pipeline
    from aptq.core.plan import Plan, Target
    from aptq.exporting import export_to

    chosen = replace(recipe, budget=f"{bits:.6f}bpw")
    plan = pipeline.plan(options.model, chosen, scores=scores).plan
    targets = plan.targets | {"model.embed_tokens": Target.parse(EMBEDDING)}
    out = options.scratch / f"run-{bits:.4f}"
    file = options.scratch / f"run-{bits:.4f}.gguf"
    for path in (out, file):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    how = {"recipe": chosen, "plan": Plan(targets, plan.made_by), "scores": scores}
    began = time.perf_counter()
    done = pipeline.compress(options.model, out, device=options.device, **how)
    seconds = round(time.perf_counter() - began, 1)
    export_to(out, file, to="gguf")
    return out, {"bpw": done.bits, "seconds": seconds, "checkpoint_bytes": file.stat().st_size}


def perplexities(options: argparse.Namespace, folder: Path) -> common.Row:
    model, found = ours.dense(folder, options.device), {}
    for name, file in ours.TEXTS["test"].items():
        ids = ours.tokens(options.model, options.shared / "data" / file)[: options.limit * WINDOW]
        result = ours.perplexity(model, ids, options.device, window=WINDOW)
        found[f"{name}_first{options.limit}"] = round(result.ppl, 4)
    return found


def main() -> None:
    options = arguments()
    options.scratch.mkdir(parents=True, exist_ok=True)
    from aptq.recipe import Recipe

    text = options.shared / "data" / "c4_calibration.txt"
    size = {"samples": options.samples, "length": options.length}
    recipe = Recipe.load("aptq").adapt(profile="gguf", source=str(text), budget="4.5bpw", **size)
    scores = scored(options, recipe)
    name = f"gguf_types-{options.device.split(':')[0]}"
    how = {"device": options.device, "protocol": PROTOCOL, "folder": options.results}
    results = common.Results.open(name, **how)
    fixed: common.Row = {"model_sha256": common.sha256_model(options.model), "seed": 0}
    fixed |= {"windows": options.limit, "linear_bytes": None, "peak_gib": None}
    for pair in options.peer:
        report, _, folder = pair.partition("=")
        peer = json.loads(Path(report).read_text("utf-8"))
        row = fixed | {"label": f"llama.cpp {peer['type']} + imatrix", "ours": False}
        row |= {"bpw": peer["bpw"], "checkpoint_bytes": peer["file_bytes"], "recipe_sha256": None}
        row |= {"calibration": peer["calibration"], "seconds": peer["seconds"]["oneshot"]}
        mine = fixed | {"label": f"aptq, profile gguf, as {peer['type']}", "ours": True}
        mine |= {"calibration": peer["calibration"], "recipe_sha256": ours.sha256_recipe(recipe)}
        if not results.find(row):
            row |= perplexities(options, Path(folder))
            results.append(row)
        if not results.find(mine):
            out, known = compressed(options, recipe, scores, peer["bpw"])
            mine |= known | perplexities(options, out)
            results.append(mine)
        for one in (row, mine):
            print({k: v for k, v in one.items() if k in ("label", "bpw") or "_first" in k})


if __name__ == "__main__":
    main()
