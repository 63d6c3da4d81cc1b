"""RTN: round every weight to the nearest value of its grid; no data.

Minimises |W - Q|^2 over Q on the layer's grid for given scales, W, Q [out, in]; with clip < 1 also
over the range of each group (the "mse" grid of GPTQ's reference code, arXiv:2210.17323).
"""

from dataclasses import dataclass

from aptq.core.parts import nearest_part
from aptq.core.rounding import shrinks
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods


@methods.register("rtn")
@dataclass(frozen=True, kw_only=True)
class RTN(Stage):
    """Round to nearest, the floor that every other method has to beat."""

    # smallest share of a group's range that is tried; 1.0 = min-max, what RTN usually means
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for a share out of range."""
        if not 0 < self.clip <= 1:
            raise ValueError(
                f"rtn: clip = {self.clip} is out of range\nit must lie in (0, 1]\n"
                "correct it in the recipe"
            )

    def on_layer(self, layer: Layer) -> Layer:
        """Add the rounded residual."""
        grid = layer.target.grid
        assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
        layer.add(nearest_part(layer.residual(), grid, shrink=shrinks(self.clip)))
        return layer
