"""Refine: the base of stages that lower tr((Q - T) H (Q - T)^T) of a layer that is rounded already.

Q [out, in] the layer's codes, T what they should be: its weight (with `drift` what comes nearest to
the original outputs from the inputs at hand) less what parts beside the codes hold, H [in, in] the
damped second moment of its inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from aptq.core.descent import Quadratic
from aptq.core.grid import Grid
from aptq.core.parts import Dense, Quantized, nearest_part
from aptq.engine.knobs import part_in
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage
from aptq.stats.hessian import Hessian


@dataclass(frozen=True, kw_only=True)
class Refine(Stage):
    """Start from the part that a stage left, or from T rounded; never end above the start.

    16-bit layers are left alone.
    """

    damp: float = 0.01  # share of mean(diag H) added to the diagonal; that of GPTQ's paper
    first: float = 0.0  # weight of a window's first token as a share of the whole window's
    # weights of the rows of H: alike, or by the squared gradient of the model's loss by position
    rows: Literal["uniform", "gradient"] = "uniform"
    # share of the change of the inputs, made by compressed blocks before, that the weights make up
    # for (arXiv:2504.02692); that of the `gptq` before; 0 = none
    drift: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for shares out of range."""
        if self.damp < 0 or not 0 <= self.first < 1 or not 0 <= self.drift <= 1:
            raise ValueError(
                f"{self.name}: an option is out of range\ndamp = {self.damp} >= 0, first = "
                f"{self.first} [0..1), drift = {self.drift} [0..1]\ncorrect it in the recipe"
            )

    @abstractmethod
    def refine(self, problem: Quadratic, part: Quantized) -> Quantized:
        """A part on the same grid whose loss is not higher in any row."""

    def needs(self) -> tuple[Hessian, ...]:
        """The second moment of the inputs: the same as plain `gptq` asks for."""
        return (Hessian(first=self.first, rows=self.rows, drift=self.drift > 0),)

    def problem(self, layer: Layer, grid: Grid) -> Quadratic | None:
        """What is minimised; None where there are no inputs to go by, or not finite ones."""
        hessian = layer.stats.get(self.needs()[0])
        if not isinstance(hessian, Hessian) or hessian.empty:
            return None
        hessian.check_rows(layer.name)
        H = hessian.metric(self.damp)
        if not H.sum().isfinite():
            return None
        return Quadratic(hessian.target(layer.weight, self.drift) - layer.beside(), H, grid)

    def objective(self, layer: Layer) -> float:
        """tr((Q - T) H (Q - T)^T); |W - Q|^2 without inputs."""
        problem = self.problem(layer, Grid())
        if problem is None:
            return super().objective(layer)
        error = layer.codes().dense() - problem.weight
        return float(((error @ problem.H) * error).sum())

    def on_layer(self, layer: Layer) -> Layer:
        """Replace the codes by better ones, beside what else the layer has."""
        own = layer.codes()
        if own.parts and isinstance(own.parts[0], Dense):
            return layer
        part = part_in(own)
        grid = layer.target.grid if part is None else part.grid
        assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
        fixed = grid.dense or grid.special  # types of GGUF's own keep the scales that they have
        problem = None if fixed else self.problem(layer, grid)
        if part is None:
            start = nearest_part(own.weight if problem is None else problem.weight, grid)
            layer.add(start)
            part = start if isinstance(start, Quantized) and not fixed else None
        if part is None or fixed:
            return layer
        if problem is None:
            for count in ("fallbacks", "nearest"):
                layer.counts[count] = layer.counts.get(count, 0) + 1
            return layer
        layer.parts[0] = self.refine(problem, part)  # codes stand first
        return layer
