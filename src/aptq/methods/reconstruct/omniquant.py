"""OmniQuant: learned ranges of groups, and learned scales that fold away (arXiv:2308.13137).

LWC: the range of a group is sigmoid(l) min .. sigmoid(u) max of its weights; rounding is nearest.
LET: (X - d) / s enters a linear whose columns are W s and whose bias is b + W d, where s and d
fold into a norm or a linear before.  Weights stay as they are; both are trained on the output of
the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aptq.engine.fold import Kind, Pair
from aptq.engine.stage import methods
from aptq.stats.reach import Folding


@methods.register("omniquant")
@dataclass(frozen=True, kw_only=True)
class OmniQuant(Folding):
    """Clip and, if asked, transform.  The paper's second loss term is target = "both".

    Ranges start at those of an earlier stage.  Its codes stay where the ranges find nothing
    better, but what it compensated for (GPTQ) is not in the ranges: put it behind, not in front.
    """

    # "none" is the paper's for LLaMA with 16-bit activations, "scale" its choice for OPT
    transform: Literal["none", "scale", "scale+shift"] = "none"

    def kinds(self) -> tuple[Kind, ...]:
        """All that fold exactly, the paper's and up -> down."""
        return () if self.transform == "none" else super().kinds()

    def shifted(self, pairs: Sequence[Pair]) -> bool:
        """Only linears that have a bias can store a shift: checkpoints gain no tensors.

        Raises ValueError where shifts are asked for and no pair of the block takes one.
        """
        if self.transform != "scale+shift":
            return False
        if pairs and not any(pair.shifts for pair in pairs):
            lacking = ", ".join(f"{x.source} -> {'/'.join(x.readers)}" for x in pairs[:3])
            raise ValueError(
                "omniquant: transform = 'scale+shift' needs linears and norms with biases\n"
                f"none of {len(pairs)} pairs can store a shift: {lacking}\n"
                "set transform = 'scale'"
            )
        return True
