"""EfficientQAT, Block-AP: train everything of a block, one block at a time (arXiv:2407.11062).

Minimises |B(X0) - B_q(X)|^2 over weights W [out, in], scales s and zeros z [out, groups] of all
layers, with W_q = s (clamp(round(W / s) + z, 0, 2^b - 1) - z) and straight-through gradients; B is
the original block on the original's inputs X0, B_q the tuned one on the inputs at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aptq.engine.affine import AffineKnob
from aptq.engine.knobs import Knob, part_in
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Reconstruct
from aptq.engine.stage import methods
from aptq.engine.tune import Pace


@methods.register("efficientqat")
@dataclass(frozen=True, kw_only=True)
class EfficientQAT(Reconstruct):
    """Weights, scales, zeros and norms of a block by AdamW.

    Rates are shares of a group's scale, so that they fit every model.  They are several times the
    paper's (2e-5 and 1e-4 for weights of about 0.02), for it takes twenty times as many steps.
    """

    steps: int = 200  # AutoRound's, so that the two compare; the paper's 4,096 are of 2 windows
    weights: float = 8e-3  # rate of the weights, in steps of the grid; 2e-3 was worse (docs/log.md)
    scales: float = 1e-2  # rate of the scales, as a share of each; with the above
    zeros: float = 5e-3  # rate of the zeros, in steps of the grid; only where the grid has zeros
    norms: float = 1e-4  # the paper trains them with the weights

    def knob(self, layer: Layer, generator: torch.Generator) -> Knob:
        """All of the layer, from its parts or from the nearest ones."""
        part = part_in(self.on_layer(layer))
        assert part is not None, layer.name
        return AffineKnob(part, layer.weight, self.weights, self.scales, self.zeros, follow=True)

    def pace(self) -> Pace:
        """AdamW, cosine to a twentieth: the paper's."""
        return Pace(self.steps, "adamw", "cosine", checks=self.checks)
