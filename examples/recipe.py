"""A recipe of one's own: which methods, on what data.  usage: python recipe.py MODEL OUT"""

import sys
from dataclasses import replace

import aptq
from aptq.methods.quantize.descent import Descent
from aptq.methods.quantize.gptq import GPTQ


def main(source: str, out: str, **data: int) -> None:
    base = aptq.Recipe.load("gptq").adapt(grid="int4-row", **data)
    # damping and the order of columns are options of GPTQ; descent follows it
    stages = (GPTQ(damp=0.02, columns="activation"), Descent())
    recipe = replace(base, stages=stages)
    done = aptq.compress(source, out, recipe=recipe)
    for row in done.rows:
        print(f"{row.role:>6} {row.grid:<12} {row.bits:.3f} bits, error {row.error:.2e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
