"""circuit: what a candidate's errors weigh in the task's circuit (arXiv:2504.07389).

sum |G| |dW| |W| over the weights of a layer, G = sum_n |dL_n / dW|, L the next-token loss on the
calibration text; dW [out, in] by the recipe's own stages, 0 where a weight is kept.  With an
allocator over shares of outliers it stands for TaCQ's one threshold for all layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aptq.engine.backward import Labels
from aptq.engine.layer import Layer
from aptq.engine.local import Local
from aptq.engine.measure import Subject
from aptq.engine.stage import methods
from aptq.engine.stat import Stat
from aptq.stats.importance import Importance


@methods.register("circuit")
@dataclass(frozen=True, kw_only=True)
class Circuit(Local):
    """Gradient times change, summed without regard to signs."""

    unit: ClassVar[Literal["nats", "relative"]] = "relative"
    backward: ClassVar[bool] = True

    magnitude: bool = True  # with the factor |W|: the paper's; without it |G dW|

    @property
    def loss(self) -> Labels:
        """The text's own next tokens: it is a task that is asked for."""
        return "data"

    def needs(self) -> tuple[Stat, ...]:
        """Sizes of gradients."""
        return (Importance(),)

    def score(self, subject: Subject, layer: Layer, changes: Iterator[Tensor]) -> Tensor:
        """[1, candidates]; zeros for an expert that no token came by."""
        size = layer.stats[Importance()].sums.get("size")
        weight = layer.weight.abs() if self.magnitude else 1.0
        found = [
            dW.new_zeros(()) if size is None else (size * dW.abs() * weight).sum() for dW in changes
        ]
        return torch.stack(found).double()[None]
