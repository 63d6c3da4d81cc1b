"""GWQ: keep the weights with the largest gradients of the loss in 16 bits (arXiv:2411.00850).

Outliers are the largest sum_n |dL_n / dW| [out, in] of each layer, n the calibration windows, L the
model's own next-token loss; the paper takes one window and 1 % of the weights.
"""

from dataclasses import dataclass

from aptq.engine.stage import methods
from aptq.stats.importance import GradientMarked


@methods.register("gwq")
@dataclass(frozen=True, kw_only=True)
class GWQ(GradientMarked):
    """Gradient-aware outliers; how many, the target says."""
