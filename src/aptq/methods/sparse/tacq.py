"""TaCQ: keep the weights of a task's circuit in 16 bits (arXiv:2504.07389).

Outliers are the largest sum_n |dL_n / dW| |W - Q| |W| [out, in]; L the next-token loss on text of
the task, Q the weights rounded to the layer's grid.  The paper takes 0.35 % of all weights by one
threshold for the model; here a plan says how many of each layer, and measure `circuit` with an
allocator chooses such a plan.
"""

from dataclasses import dataclass
from typing import Literal

from aptq.engine.stage import methods
from aptq.stats.importance import GradientMarked, Weighting


@methods.register("tacq")
@dataclass(frozen=True, kw_only=True)
class TaCQ(GradientMarked):
    """Task-circuit weights; how many, the target says."""

    by: Literal["taylor", "tacq"] = "tacq"  # with or without the factor |W|; with: the paper

    @property
    def weighting(self) -> Weighting:
        """As asked for."""
        return self.by
