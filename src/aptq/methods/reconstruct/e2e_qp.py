"""E2E-QP of EfficientQAT: train scales end to end, codes fixed (arXiv:2407.11062).

Minimises KL(p || p_q) of the next tokens over all scales s [out, groups] (and norms); the paper
takes the likelihood of a text, which needs far more of it than the original's own distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

from aptq.engine.affine import AffineKnob
from aptq.engine.block import Block
from aptq.engine.endtoend import EndToEnd
from aptq.engine.knobs import Knobs, part_in, tunable_layers
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.summed import summed


@methods.register("e2e_qp")
@dataclass(frozen=True, kw_only=True)
class EndToEndScales(EndToEnd):
    """Scales, norms and, where asked for, weights of the whole model by AdamW."""

    scales: float = 1e-3  # rate as a share of each scale; the paper's 2e-5 for scales of 0.02
    norms: float = 1e-4  # rate of the norms' weights
    weights: float = 0.0  # rate of the weights in steps of their grid; 0 = codes stay, the paper's
    zeros: float = 0.0  # rate of the zeros in steps; 0 = they stay, the paper's
    # rate of factors beside the codes, as a share of their size; that of lrec, not tuned
    factors: float = 1e-2

    @property
    def tuning(self) -> float:
        """Latents that are trained have a gradient, two moments and copies too."""
        return super().tuning + (20.0 if self.weights else 0.0)

    def open(self, block: Block) -> Knobs:
        """All quantized layers of the block."""
        found = {}
        for name, layer in tunable_layers(block).items():
            knob = summed(layer, self.knob, self.factors)
            assert knob is not None, name
            found[name] = knob
        return Knobs(block, found, self.norms)

    def knob(self, layer: Layer) -> AffineKnob:
        """The codes of one layer."""
        part = part_in(layer)
        assert part is not None, layer.name
        rates = (self.weights, self.scales, self.zeros)
        return AffineKnob(part, layer.weight, *rates, follow=False)
