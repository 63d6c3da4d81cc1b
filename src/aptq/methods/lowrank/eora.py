"""EoRA: factors that give back most of the layer's output, in closed form (arXiv:2410.21271).

Minimises tr((W - Q - B A) H (W - Q - B A)^T); W, Q [out, in], B [out, rank], A [rank, in], H
[in, in] the second moment of the inputs.  With E = W - Q and H = S S^T, B A S is the truncated
singular value decomposition of E S.
"""

from dataclasses import dataclass

from aptq.engine.stage import methods
from aptq.stats.correct import InInputs


@methods.register("eora")
@dataclass(frozen=True, kw_only=True)
class EoRA(InInputs):
    """Eigenspace low-rank approximation of what earlier stages left of a layer."""
