"""ChoiceKnob: every weight chooses between the two codes around it, and scales may move.

W_q = gain s (lower + h(v) - z) with AdaRound's h; methods say what v and gain are made of.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from aptq.core.adaround import between, logits_of, rectified
from aptq.core.parts import Part, Quantized
from aptq.core.rounding import Scales, code_offset
from aptq.core.soft import spread, stored_scale
from aptq.engine.knobs import Knob


class ChoiceKnob(Knob):
    """The factor multiplies what codes stand for, never the division that made them."""

    lower: Tensor  # uint8 [out, in]
    unit: Tensor  # scales float32 [out, groups] at gain 1
    zero: Tensor | None  # [out, groups] as stored

    def __init__(self, part: Quantized) -> None:
        """part: what is opened; `start` says between which codes."""
        super().__init__()
        self.grid = part.grid
        scale, zero = part.scales()
        self.register_buffer("unit", scale.float())
        self.register_buffer("zero", zero)

    def start(self, part: Quantized, weight: Tensor) -> Tensor:
        """Logits [out, in] that round to `part`, and are `weight` while soft (see `between`)."""
        lower, fraction = between(part, weight)
        self.register_buffer("lower", lower)
        return logits_of(fraction)

    @abstractmethod
    def logits(self) -> Tensor:
        """v [out, in]; the upper code is taken where v >= 0."""

    @abstractmethod
    def gain(self) -> Tensor:
        """Factors [out, groups] of the scales; exactly 1 in the beginning."""

    def scale(self) -> Tensor:
        """Scales [out, groups] as they are stored, float32, differentiable."""
        return stored_scale(self.unit * self.gain(), self.grid)

    def weight(self) -> Tensor:
        """Soft weight [out, in] float32."""
        columns = self.lower.shape[1]
        wide = None if self.zero is None else spread(self.zero.float(), columns, self.grid)
        codes = self.lower + rectified(self.logits())
        return (codes - code_offset(wide, self.grid)) * spread(self.scale(), columns, self.grid)

    @torch.no_grad()
    def part(self) -> Part:
        """Codes by the side on which each logit is; zeros as they came."""
        codes = self.lower + (self.logits() >= 0).to(torch.uint8)
        scale = self.scale().to(self.grid.scale_dtype)
        return Quantized.make(codes, Scales(scale, self.zero), self.grid)
