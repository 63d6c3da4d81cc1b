"""The measuring pass of a recipe alone: python scores.py MODEL OUT --set measure.use=kl ..."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    ours.add_recipe_arguments(parser)
    options = parser.parse_args()
    options.budget = options.budget or "4bpw"
    from aptq import pipeline

    began = time.perf_counter()
    recipe = ours.recipe_of(options)
    scores = pipeline.measure(options.model, options.out, recipe=recipe, device=options.device)
    seconds = time.perf_counter() - began
    print(f"{scores.measure}: {len(scores.losses)} layers in {seconds:.1f} s")


if __name__ == "__main__":
    main()
