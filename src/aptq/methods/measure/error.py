"""error: mean squared change of a layer's output per token, tr(dW H dW^T), with the real quantizer.

dW = Q - W [out, in], H = E[x x^T] [in, in] (arXiv:2210.17323, eq. 1): GPTQ's own objective.  It
does not know what the rest of the model makes of the change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aptq.engine.layer import Layer
from aptq.engine.local import Local
from aptq.engine.measure import Subject, row_damage
from aptq.engine.stage import methods
from aptq.stats.halves import HALVES, HalfHessian, halves


@methods.register("error")
@dataclass(frozen=True, kw_only=True)
class Error(Local):
    """Error of the layer's output, all tokens alike."""

    unit: ClassVar[Literal["nats", "relative"]] = "relative"

    def needs(self) -> tuple[HalfHessian, ...]:
        """Second moments of the inputs."""
        return HALVES

    def score(self, subject: Subject, layer: Layer, changes: Iterator[Tensor]) -> Tensor:
        """Sum of |dW x_t|^2 of each half."""
        held = [(half.matrix(), half.sums["weight"]) for half in halves(layer)]
        found = [[row_damage(dW, H).sum() * rows for H, rows in held] for dW in changes]
        return torch.stack([torch.stack(both) for both in found], dim=1)
