"""Peak anonymous memory against depth: one random Llama with 6 and with 24 blocks of 100 MiB.

One block is in memory at a time and activations are on disk, so the peaks of the two compressing
processes should differ by less than half a block.  RssAnon is sampled every 5 ms from outside: it
leaves out file pages, which the system takes back at will.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import random_llama

HERE = Path(__file__).resolve().parent
PROTOCOL = "peak RssAnon of the compressing process, sampled every 5 ms, activations on disk"
INTERVAL = 0.005  # seconds between samples


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, help="folder for the models (4 GiB); default temporary"
    )
    parser.add_argument("--blocks", type=int, nargs=2, default=(6, 24), metavar=("FEW", "MANY"))
    parser.add_argument("--recipe", default="aptq")
    parser.add_argument("--grid", default="int4-g64-z")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--name", default="memory-cpu")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def anonymous(process: int) -> int:
    """RssAnon of a process in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def watch(words: list[str]) -> tuple[int, float]:
    """Run a program; its peak of anonymous memory in bytes, and its seconds."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}\nended with {process.returncode}")
    return peak, time.perf_counter() - start


def words_of(options: argparse.Namespace, model: Path, out: Path) -> list[str]:
    words = [
        sys.executable,
        str(HERE / "ours.py"),
        str(model),
        str(out),
        "--recipe",
        options.recipe,
    ]
    words += ["--grid", options.grid, "--shared", str(options.shared), "--activations", "disk"]
    words += ["--samples", str(options.samples), "--length", str(options.length)]
    words += ["--threads", str(options.threads)]
    for change in options.changes:
        words += ["--set", change]
    return words


def measure(options: argparse.Namespace, blocks: int, work: Path) -> dict[str, float]:
    model = work / f"random-{blocks}"
    random_llama.write_model(model, blocks)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        peak, seconds = watch(words_of(options, model, Path(scratch) / "run"))
    print(f"{blocks} blocks: peak {peak / 2**20:.1f} MiB anonymous, {seconds:.1f} s", flush=True)
    return {"blocks": blocks, "peak_anonymous_bytes": peak, "seconds": round(seconds, 1)}


def main() -> None:
    options = arguments()
    results = common.Results.open(
        options.name, device="cpu", protocol=PROTOCOL, folder=options.results
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        few, many = (measure(options, blocks, work) for blocks in options.blocks)
    block = random_llama.block_bytes()
    difference = many["peak_anonymous_bytes"] - few["peak_anonymous_bytes"]
    tokens = options.samples * options.length
    row = {"label": f"{options.recipe} {options.grid}, {tokens} tokens", "block_bytes": block}
    row |= {"runs": [few, many], "difference_blocks": round(difference / block, 4)}
    results.append(row)
    print(
        f"difference {difference / 2**20:.1f} MiB = {difference / block:.3f} blocks (goal <= 0.5)"
    )


if __name__ == "__main__":
    main()
