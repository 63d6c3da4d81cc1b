"""trace: APTQ's sensitivity, the mean diagonal of a layer's second-order matrix (arXiv:2402.14866).

tr H / (out in) per token, H [out in, out in] of the layer's own output (= tr E[x x^T] / in) or of
the attention's.  It knows no candidate: the table holds it at all but the largest one, which gets
0, for a threshold to rank by; times |dW|^2 it is HAWQ-V2's (arXiv:1911.03852), for solvers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aptq.engine.layer import Layer
from aptq.engine.local import Local
from aptq.engine.measure import Subject
from aptq.engine.stage import methods
from aptq.engine.stat import Stat
from aptq.stats.attention import AttentionHessian
from aptq.stats.halves import HALVES, halves
from aptq.stats.hessian import Hessian


@methods.register("trace")
@dataclass(frozen=True, kw_only=True)
class Trace(Local):
    """Average curvature; the real quantizer is asked with weigh = "error" only."""

    unit: ClassVar[Literal["nats", "relative"]] = "relative"

    # of the layer's own output, or for q, k, v of the attention's (the paper); noise is known for
    # the former alone
    hessian: Literal["layer", "attn-in"] = "attn-in"
    mlp: bool = False  # with attn-in: gate and up by the output of their MLP, like down
    weigh: Literal["none", "error"] = "none"  # what the trace is multiplied by

    @property
    def compares(self) -> bool:
        """The trace itself knows no candidate."""
        return self.weigh == "error"

    def needs(self) -> tuple[Stat, ...]:
        """Second moments of the inputs, or the attention's."""
        if self.hessian == "layer":
            return HALVES
        return (AttentionHessian(mode="attn-in", mlp=self.mlp),)

    def score(self, subject: Subject, layer: Layer, changes: Iterator[Tensor]) -> Tensor:
        """Sums over the tokens of each half, or of all windows, [2 | 1, candidates]."""
        held: list[tuple[Hessian, int]] = []
        if self.hessian == "layer":
            held += [(half, layer.weight.shape[1]) for half in halves(layer)]
        else:
            stat = layer.stats[self.needs()[0]]
            assert isinstance(stat, AttentionHessian), type(stat)
            # plain sums stand for one output row, the attention's for all of them
            held += [(stat, layer.weight.numel() if stat.attentive else layer.weight.shape[1])]
        means = [H.matrix().diagonal().double().sum() * H.sums["weight"] / n for H, n in held]
        if self.weigh == "error":
            sizes = torch.stack([dW.double().square().sum() for dW in changes])
        else:
            sizes = torch.ones(
                len(subject.targets), dtype=torch.float64, device=layer.weight.device
            )
            sizes[subject.ranked()[-1]] = 0
        return torch.stack(means)[:, None] * sizes
