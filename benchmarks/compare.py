"""`aptq compare` of checkpoints that several tools made: size, perplexity, divergence.

usage: python compare.py REFERENCE FOLDER=LABEL ... [--name compare-cpu]
How a folder was made is told by its label; ours are run folders.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import common

TEXT = "wiki_validation.txt"
LENGTH = 2048
PROTOCOL = (
    f"`aptq compare` on {TEXT}: first windows of {LENGTH} tokens, mean NLL and KL to the reference "
    "with 95 % intervals over windows; every model is loaded as transformers loads it"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("models", nargs="+", metavar="FOLDER=LABEL")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--name", default="compare-cpu")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    labels = dict(text.split("=", 1) for text in options.models)
    text = ["--text", str(options.shared / "data" / TEXT), "--length", str(LENGTH)]
    words = ["--reference", str(options.reference), "--windows", str(options.windows)]
    words += ["--device", options.device, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "aptq", "compare", *labels, *text, *words],
        capture_output=True,
        text=True,
        check=True,
    )
    results = common.Results.open(
        options.name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    sha256 = common.sha256_model(options.reference)
    for label, row in zip(labels.values(), json.loads(done.stdout)["models"], strict=True):
        fixed = {"label": label, "model_sha256": sha256, "windows": options.windows}
        fixed |= {"ours": row["format"] == "aptq"}
        row = {**fixed, **{key: value for key, value in row.items() if key != "model"}}
        print(f"{label}: {row}", flush=True)
        results.append(row)


if __name__ == "__main__":
    main()
