"""Correct: the base of stages that add factors to codes that are there, against what is left.

E = T - Q [out, in]: T the layer's weight (with `drift` what comes nearest to the original outputs
from the inputs at hand), Q the sum of the parts so far.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from aptq.core.factors import Root, Spectrum, best_part, identity_root, metric_root, spectrum
from aptq.core.parts import nearest_part
from aptq.core.plan import Target
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage
from aptq.stats.hessian import Hessian


@dataclass(frozen=True, kw_only=True)
class Correct(Stage):
    """Add the factors that the layer's target names, if it names any.

    A layer without codes is rounded to nearest first.
    """

    @abstractmethod
    def metric(self, layer: Layer) -> tuple[Root, Tensor | None] | None:
        """Root of the metric and H [in, in], None for the identity; None where there is neither."""

    def wanted(self, layer: Layer) -> Tensor:
        """What all parts together should be, [out, in] float32."""
        return layer.weight

    def objective(self, layer: Layer) -> float:
        """tr(E H E^T)."""
        found = self.metric(layer)
        error = layer.dense() - self.wanted(layer)
        H = None if found is None else found[1]
        return float(((error if H is None else error @ H) * error).sum())

    @property
    def adds(self) -> bool:
        """Only what earlier stages left is looked at."""
        return True

    def on_layer(self, layer: Layer) -> Layer:
        """Add the factors."""
        grid, spec = layer.target.grid, layer.target.part("lowrank")
        if not layer.coded:
            assert grid is not None, f"{layer.name} has no single grid: {layer.target}"
            layer.add(nearest_part(layer.residual(), grid))
        if spec is None or any(part.meta()["type"] == "lowrank" for part in layer.parts):
            return layer
        found = self.metric(layer)
        if found is None:
            layer.counts["fallbacks"] = layer.counts.get("fallbacks", 0) + 1
        root, H = found or plain(layer)
        error = self.wanted(layer) - layer.dense()
        layer.add(best_part(error, spectrum(error, root), spec, H))
        return layer

    def extend(self, layer: Layer, base: Tensor, targets: Sequence[Target]) -> Iterator[Tensor]:
        """The dense weights at targets that differ in their factors, on top of `base` [out, in]."""
        root, H = self.metric(layer) or plain(layer)
        error = self.wanted(layer) - base
        found: Spectrum | None = None
        for target in targets:
            spec = target.part("lowrank")
            if spec is None:
                yield base
                continue
            found = found or spectrum(error, root)
            yield base + best_part(error, found, spec, H).dense()


@dataclass(frozen=True, kw_only=True)
class InInputs(Correct):
    """Errors count by what they do to the layer's output: in the metric of its inputs."""

    first: float = 0.0  # weight of a window's first token as a share of the whole window's
    # weights of the rows of H: alike (the papers), or by the squared gradient of the model's loss
    # at the layer's output, by position
    rows: Literal["uniform", "gradient"] = "uniform"
    # share of the change of the inputs, made by compressed blocks before, that the factors make up
    # for (arXiv:2504.02692); that of the `gptq` before; 0 = none, as in the papers
    drift: float = 0.0

    def needs(self) -> tuple[Hessian, ...]:
        """The second moment of the inputs: the same as plain `gptq` asks for."""
        return (Hessian(first=self.first, rows=self.rows, drift=self.drift > 0),)

    def seen(self, layer: Layer) -> Hessian | None:
        """The Hessian; None where there are no inputs to go by, or not finite ones."""
        hessian = layer.stats.get(self.needs()[0])
        if not isinstance(hessian, Hessian) or hessian.empty:
            return None
        H = hessian.matrix()
        return hessian if bool(H.sum().isfinite()) and bool(H.any()) else None

    def weighting(self, H: Tensor) -> Tensor:
        """What errors are weighted by, [in, in], of the second moment H."""
        return H

    def metric(self, layer: Layer) -> tuple[Root, Tensor | None] | None:
        """H and its root, which the layers of a group share."""
        hessian = self.seen(layer)
        if hessian is None:
            return None
        if self not in hessian.cache:
            H = self.weighting(hessian.matrix())
            hessian.cache[self] = metric_root(H), H
        return hessian.cache[self]  # type: ignore[return-value]

    def wanted(self, layer: Layer) -> Tensor:
        """The weight, or what comes nearest to the original outputs."""
        hessian = self.seen(layer)
        return layer.weight if hessian is None else hessian.target(layer.weight, self.drift)


def plain(layer: Layer) -> tuple[Root, None]:
    """The metric of a layer without inputs."""
    return identity_root(layer.weight.shape[1], layer.weight.device), None
