"""Marked: the base of stages that choose single weights to keep in 16 bits.

They come before the quantizers, which see what is left: zeros at the places that are kept.  Where
error compensation moves those places later, their codes take it up.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.core.parts import Sparse
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Marked(Stage):
    """Keep as many weights of a layer as its target says; one that names none is left alone."""

    @property
    def marks(self) -> bool:
        """It only chooses outliers."""
        return True

    @abstractmethod
    def score(self, layer: Layer) -> Tensor | None:
        """What it would cost to round each weight, float32 [out, in]; None where nothing tells."""

    def on_layer(self, layer: Layer) -> Layer:
        """Add the outliers; by magnitude, counted, where no score is known."""
        spec = layer.target.part("sparse")
        if spec is None or any(isinstance(part, Sparse) for part in layer.parts):
            return layer
        score = self.score(layer)
        if score is None:
            layer.counts["fallbacks"] = layer.counts.get("fallbacks", 0) + 1
            score = layer.weight.abs()
        rest = layer.residual()
        layer.add(Sparse.make(rest, largest(score, spec.count((len(rest), rest.shape[1]))), spec))
        return layer


def largest(score: Tensor, count: int) -> Tensor:
    """Mask bool [out, in] of exactly the `count` largest scores; ties go to the earlier place."""
    order = score.flatten().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    return mask.scatter_(0, order, True).view_as(score)
