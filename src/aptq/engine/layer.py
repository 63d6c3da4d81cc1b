"""Layer: one linear on its way from weight to parts."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aptq.core.parts import Part
from aptq.core.plan import Target
from aptq.core.target import CODED, ORDER
from aptq.engine.stat import Stat


@dataclass
class Layer:
    """One linear of a block while stages work on it."""

    name: str  # full name in the normalised model, "model.layers.3.self_attn.q_proj"
    role: str  # "q", "k", "gate", ...: what the architecture table calls it
    weight: Tensor  # [out, in] float32: what the parts must add up to
    bias: Tensor | None  # [out]
    target: Target
    stats: dict[Stat, Stat] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    # what a stage reports: damping, fallbacks, dead columns
    counts: dict[str, float] = field(default_factory=dict)
    profile: Tensor | None = None  # [bins] mean squared output gradient by position, if measured
    damping: float | None = None  # share of the mean diagonal that a factorisation has added
    marked: Tensor | None = None  # uint8 [out, ceil(in / 8)]: a bit at each outlier that was found
    window: int = 0  # tokens of a window that `profile` was measured on

    @property
    def coded(self) -> bool:
        """Are there codes, or 16-bit weights, for all places?"""
        return any(part.meta()["type"] in CODED for part in self.parts)

    def beside(self) -> Tensor:
        """What the parts beside the codes hold together, [out, in] float32."""
        others = (part.dense() for part in self.parts if part.meta()["type"] not in CODED)
        return sum(others, start=torch.zeros_like(self.weight))

    def codes(self) -> "Layer":
        """The layer as its codes see it: what the other parts hold is taken off the weight."""
        own = [part for part in self.parts if part.meta()["type"] in CODED]
        if len(own) == len(self.parts):  # nearly always: no copy of the weight
            return self
        return replace(self, weight=self.weight - self.beside(), parts=own)

    def add(self, part: Part) -> None:
        """One more part; they stand in the order of the target's, whichever comes first."""
        self.parts.append(part)
        self.parts.sort(key=lambda part: ORDER.index(part.meta()["type"]))

    def dense(self) -> Tensor:
        """Sum of the parts, [out, in] float32."""
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return total

    def residual(self) -> Tensor:
        """What the parts do not hold yet: weight - sum of parts, [out, in] float32."""
        return self.weight - self.dense() if self.parts else self.weight.clone()

    def error(self) -> float:
        """Relative squared error of the weight, |W - Q|^2 / |W|^2."""
        total = float(self.weight.square().sum())
        return float(self.residual().square().sum()) / total if total > 0 else 0.0
