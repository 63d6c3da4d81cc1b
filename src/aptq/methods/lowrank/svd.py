"""SVD: the product of two factors that is nearest to what rounding left, by |W - Q - B A|^2.

The baseline of EoRA (arXiv:2410.21271); W, Q [out, in], B [out, rank], A [rank, in].
"""

from dataclasses import dataclass

from torch import Tensor

from aptq.core.factors import Root, identity_root
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.stats.correct import Correct


@methods.register("svd")
@dataclass(frozen=True, kw_only=True)
class SVD(Correct):
    """Truncated singular value decomposition; looks at no data."""

    def metric(self, layer: Layer) -> tuple[Root, Tensor | None]:
        """The identity."""
        return identity_root(layer.weight.shape[1], layer.weight.device), None
