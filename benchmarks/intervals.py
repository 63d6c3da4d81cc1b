"""Does the interval of a difference hold?  Of one half of the windows, for the other half's mean.

usage: python intervals.py MODEL --folder RUN
The NLLs of every window are taken once and stored; all that follows is splitting them.  The mean
of the other half varies too, so the interval is the one for the mean of as many other windows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import common
import ours
import torch

PROTOCOL = (
    "NLL in nats of each window (first windows of each text, no special tokens) under the "
    "original and the run, dequantised bf16; difference of the two window by window; halves drawn "
    "at random; held: splits where the 95 % interval of one half, for the mean of as many other "
    "windows, holds the other half's mean difference; without: the same with the interval of the "
    "expected mean, which leaves out that the other half varies"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the yardstick")
    parser.add_argument("--folder", type=Path, required=True, help="run folder of it")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=74, help="of each text")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5, help="sets of splits")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--shared", type=Path, default=common.SHARED, help="folder with data/")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    return parser.parse_args()


def nlls(options: argparse.Namespace, folder: Path) -> list[float]:
    """NLL of every window of both texts."""
    model = ours.dense(folder, options.device)
    found: list[float] = []
    for file in ("wiki_validation.txt", "wikitext2_test.txt"):
        ids = ours.tokens(options.model, options.shared / "data" / file)
        ids = ids[: options.windows * options.window]
        result = ours.perplexity(model, ids, options.device, window=options.window)
        found += [round(nll, 7) for nll in result.nlls]
    return found


def held(moved: Sequence[float], splits: int, seed: int, *, ahead: bool = True) -> int:
    """In how many of the random splits the interval of one half holds the mean of the other."""
    from aptq.evaluate.intervals import interval

    generator, count = torch.Generator().manual_seed(seed), 0
    for number in range(splits):
        order = torch.randperm(len(moved), generator=generator).tolist()
        one = [moved[index] for index in order[: len(moved) // 2]]
        other = [moved[index] for index in order[len(moved) // 2 :]]
        found = interval(one, others=len(other) if ahead else None, seed=number)
        assert found is not None, one
        count += found.low <= math.fsum(other) / len(other) <= found.high
    return count


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    name = f"intervals-{options.device.split(':')[0]}"
    results = common.Results.open(
        name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    stored = []
    for label, folder in (("original", options.model), (options.folder.name, options.folder)):
        row: common.Row = {"label": label, "model_sha256": common.sha256_model(options.model)}
        row |= {"windows": options.windows, "window": options.window}
        if results.find(row) is None:
            results.append(row | {"nlls": nlls(options, folder)})
        known = results.find(row)
        assert known is not None, row
        stored.append(known["nlls"])
        print(f"{label}: mean NLL {sum(known['nlls']) / len(known['nlls']):.4f}", flush=True)
    moved = [ours - theirs for theirs, ours in zip(*stored, strict=True)]
    for seed in range(options.seeds):
        row = {"label": f"splits of {options.folder.name}", "seed": seed}
        row |= {"model_sha256": common.sha256_model(options.model), "windows": options.windows}
        if results.find(row) is None:
            row |= {"splits": options.splits, "difference": sum(moved) / len(moved)}
            row |= {"held": held(moved, options.splits, seed)}
            row |= {"without": held(moved, options.splits, seed, ahead=False)}
            results.append(row)
        row = results.find(row) or row
        print(f"seed {seed}: {row['held']} of {row['splits']} ({row['without']} without)")


if __name__ == "__main__":
    main()
