"""A quantizer of one's own: the best of a few ranges.  usage: python method.py MODEL OUT"""

import sys
from dataclasses import dataclass, replace

import aptq
from aptq.core.parts import part_of
from aptq.core.rounding import fit, snap
from aptq.engine.layer import Layer
from aptq.engine.stage import methods


@methods.register("narrow")
@dataclass(frozen=True, kw_only=True)
class Narrow(aptq.Stage):
    """The best of a few ranges for each group, by squared error."""

    steps: int = 4  # ranges that are tried between all and half of the largest value

    def on_layer(self, layer: Layer) -> Layer:
        grid = layer.target.grid
        assert grid is not None, layer.name
        weight = layer.residual()
        tries = [1 - 0.5 * n / self.steps for n in range(self.steps + 1)]
        scales = fit(weight, grid, shrink=tries)
        layer.parts.append(part_of(snap(weight, scales, grid), scales, grid))
        return layer


def main(source: str, out: str) -> None:
    base = aptq.Recipe.load("rtn").adapt(grid="int3-row")
    for stage in (*base.stages, Narrow(steps=8)):
        recipe = replace(base, stages=(stage,))
        done = aptq.compress(source, f"{out}-{stage.name}", recipe=recipe)
        error = sum(row.error for row in done.rows) / len(done.rows)
        print(f"{stage.name}: mean error {error:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
