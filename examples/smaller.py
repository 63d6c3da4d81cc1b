"""Compress a model from Python.  usage: python smaller.py MODEL OUT [BUDGET]"""

import sys
from pathlib import Path

import aptq


def main(source: str, out: str, budget: str = "4.3bpw", **data: int) -> None:
    recipe = aptq.Recipe.load("aptq").adapt(budget=budget, **data)
    print(f"predicted: {aptq.plan(source, recipe).nbytes:,} bytes")  # reads no weights
    done = aptq.compress(source, out, recipe=recipe)
    print(f"written: {done.bytes_after:,} bytes, {done.bits:.4f} bits a weight")
    found = aptq.assess(out, reference=source, windows=2)
    print(f"perplexity {found['perplexity']:.2f}, KL to the original {found['kl']:.4f} nats")
    worst = max(done.rows, key=lambda row: row.error)
    print(f"largest error: {worst.role} at {worst.grid}, in {Path(out).name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
