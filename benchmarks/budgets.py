"""Ten byte budgets: bytes of the folder that was written against what was asked.

usage: python budgets.py MODEL --scores scores.json
Layers are only rounded to nearest here: sizes do not depend on how the codes were found.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import common
import ours

PROTOCOL = "sum of file sizes in checkpoint/ for byte budgets; used = bytes / budget"
COUNT = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    ours.add_recipe_arguments(parser)
    options = parser.parse_args()
    options.budget = options.budget or "4bpw"
    name = f"budgets-{options.device.split(':')[0]}"
    results = common.Results.open(
        name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    from aptq import pipeline
    from aptq.core.scores import Scores
    from aptq.engine.stage import methods

    known = Scores.load(options.scores)
    recipe = replace(ours.recipe_of(options), stages=(methods.get("rtn")(),))
    low, high = (
        pipeline.plan(options.model, recipe.adapt(budget=f"{bits}bpw"), scores=known).nbytes
        for bits in (2.1, 8.3)
    )
    for number in range(COUNT):
        # uneven on purpose: nobody asks for a size that falls on a step
        budget = low + (high - low) * number // COUNT + 12_345 * number + 777
        row: common.Row = {
            "label": f"{budget} bytes",
            "model_sha256": common.sha256_model(options.model),
            "ours": True,
            "seed": options.seed,
        }
        if results.find(row):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "run"
            wanted = recipe.adapt(budget=f"{budget}B")
            done = ours.compress(options.model, out, wanted, options.device, scores=options.scores)
            real = sum(file.stat().st_size for file in (out / "checkpoint").iterdir())
        row |= done | {"budget": budget, "bytes": real, "used": round(real / budget, 6)}
        print(f"{budget}: {real} bytes, {100 * real / budget:.3f} %", flush=True)
        assert real <= budget, (real, budget)
        results.append(row)


if __name__ == "__main__":
    main()
