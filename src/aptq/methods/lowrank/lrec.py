"""LREC of INT2.1: train the factors beside the codes, end to end (arXiv:2306.08162).

Minimises KL(p || p_q) of the next tokens over B [out, rank] and A [rank, in] of all layers, codes
fixed; the paper adds the likelihood of the text and starts at B = 0, here they start where an
earlier stage (`eora`) left them: closer, and in the same format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aptq.core.parts import LowRank
from aptq.core.target import PartSpec
from aptq.engine.block import Block
from aptq.engine.endtoend import EndToEnd
from aptq.engine.knobs import Knobs
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.summed import summed


@methods.register("lrec")
@dataclass(frozen=True, kw_only=True)
class LREC(EndToEnd):
    """Factors of the whole model by AdamW; layers without factors stay."""

    factors: float = 1e-2  # rate as a share of their root mean square; a guess, not tuned
    norms: float = 0.0  # rate of the norms' weights; the paper leaves them

    def on_layer(self, layer: Layer) -> Layer:
        """Round to nearest where no stage before did; factors that none has found begin at 0."""
        layer = super().on_layer(layer)
        spec = layer.target.part("lowrank")
        if spec is not None and not any(isinstance(part, LowRank) for part in layer.parts):
            layer.add(silent(layer, spec))
        return layer

    def open(self, block: Block) -> Knobs:
        """The factors of all layers that have some."""
        found = {}
        for layer in [x for group in block.groups for x in block.open_layers(group)]:
            knob = summed(layer, None, self.factors)
            if knob is not None:
                found[layer.name] = knob
        return Knobs(block, found, self.norms)


def silent(layer: Layer, spec: PartSpec) -> LowRank:
    """Factors whose product is 0 until the left one moves, as LoRA begins (arXiv:2106.09685)."""
    out, columns = layer.weight.shape
    drawn = torch.randn(spec.rank, columns, generator=torch.Generator().manual_seed(0))
    left = layer.weight.new_zeros(out, spec.rank)
    return LowRank.make(left, drawn.to(left.device) / columns**0.5, spec)
