"""Bias tuning: train biases and norms end to end, all matrices fixed (arXiv:2006.10518, sect. 4).

Minimises KL(p || p_q) of the next tokens over biases [out] of the linears that have one, and the
norms' weights: the statistics of a convolution network's batch norms have no other counterpart.
"""

from __future__ import annotations

from dataclasses import dataclass

from aptq.engine.block import Block
from aptq.engine.endtoend import EndToEnd
from aptq.engine.knobs import Knobs
from aptq.engine.stage import methods


@methods.register("bias_tuning")
@dataclass(frozen=True, kw_only=True)
class BiasTuning(EndToEnd):
    """Vectors only: nothing is stored that was not there before."""

    rate: float = 1e-3  # of AdamW; the paper's SGD at 0.1 has no scale of its own

    def open(self, block: Block) -> Knobs:
        """Biases and norms of the block."""
        return Knobs(block, {}, self.rate, biases=True)
