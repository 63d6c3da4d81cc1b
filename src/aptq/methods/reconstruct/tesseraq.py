"""TesseraQ: decide the rounding of a block a share at a time (arXiv:2410.19103).

Minimises |B(X0) - B_q(X)|^2 over rounding logits v [out, in] and scale logits t [out, groups],
W_q = 2 sigmoid(t) s (lower + h(v) - z), h in [0, 1].  In every turn the logits that are nearest to
a decision are made hard (progressive adaptive rounding), and the others make up for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aptq.core.adaround import rectified
from aptq.core.outliers import quantile
from aptq.core.parts import Quantized, nearest_part
from aptq.core.rounding import shrinks
from aptq.engine.choice import ChoiceKnob
from aptq.engine.knobs import Knob, part_in
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Reconstruct
from aptq.engine.stage import methods
from aptq.engine.tune import Pace

# Shares that are still soft after the hardening of each turn, from the authors' configurations
SOFT = (
    *(0.8, 0.65, 0.5, 0.43, 0.38, 0.34, 0.3, 0.27, 0.24, 0.21),
    *(0.18, 0.15, 0.12, 0.10, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005),
)


@methods.register("tesseraq")
@dataclass(frozen=True, kw_only=True)
class TesseraQ(Reconstruct):
    """Progressive adaptive rounding and tuning of the dequantization scale.

    Starts from the parts of an earlier stage, or from clipped ranges of its own.  After error
    compensation, codes that are not the nearest lean towards the original weight.
    """

    steps: int = 800  # the authors take 5,000 of 4 windows
    turns: int = 20  # the authors'; fewer go through the same shares in larger strides
    rounding: float = 6e-3  # rate of the logits: the authors' 1e-3, for a sixth of their steps
    scales: float = 1e-3  # rate of the scale logits; the authors'
    decay: float = 1e-7  # of these: 1e-4 beside a sum over features, of which the loss is a mean
    clip: float = 0.55  # smallest share of a group's range that is tried; the authors'

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be."""
        super().__post_init__()
        if self.turns < 1 or not 0 < self.clip <= 1 or min(self._rates()) < 0:
            raise ValueError(
                "tesseraq: an option is out of range\n"
                f"turns = {self.turns} >= 1; clip = {self.clip} (0..1]; rounding, scales, decay = "
                f"{self._rates()} >= 0\ncorrect it in the recipe"
            )

    def _rates(self) -> tuple[float, float, float]:
        return self.rounding, self.scales, self.decay

    def on_layer(self, layer: Layer) -> Layer:
        """Nearest codes of the best shrunk ranges, where no stage before made any."""
        if not layer.parts:
            grid = layer.target.grid
            assert grid is not None, layer.name
            shrink = shrinks(self.clip, 0.05)
            layer.parts.append(nearest_part(layer.weight, grid, shrink=shrink))
        return layer

    def knob(self, layer: Layer, generator: torch.Generator) -> Knob:
        """Codes and scales of the layer."""
        part = part_in(self.on_layer(layer))
        assert part is not None, layer.name
        return Progressive(part, layer.weight, self._rates())

    def pace(self) -> Pace:
        """Adam at a constant rate, fresh in every turn: old moments would undo decisions."""
        return Pace(self.steps, "adam", "constant", turns=self.turns, checks=self.checks)


class Progressive(ChoiceKnob):
    """Logits of which fewer are soft in every turn; hard ones are infinite."""

    def __init__(self, part: Quantized, weight: Tensor, rates: tuple[float, float, float]) -> None:
        """part: the start; weight [out, in]; rates of logits and scales, decay of the latter."""
        super().__init__(part)
        self.rates = rates
        self.rounding = nn.Parameter(self.start(part, weight))
        self.factor = nn.Parameter(torch.zeros_like(self.unit))

    def logits(self) -> Tensor:
        """v [out, in]."""
        return self.rounding

    def gain(self) -> Tensor:
        """2 sigmoid(t): between 0 and 2."""
        return 2 * self.factor.sigmoid()

    def begin(self, turn: int, turns: int) -> None:
        """Make the next share hard."""
        with torch.no_grad():
            self.rounding.copy_(hardened(self.rounding, soft_share(turn, turns)))

    def groups(self) -> list[dict[str, Any]]:
        """Logits and scales."""
        rounding, scales, decay = self.rates
        return [
            {"params": [self.rounding], "lr": rounding},
            {"params": [self.factor], "lr": scales, "weight_decay": decay},
        ]


def soft_share(turn: int, turns: int) -> float:
    """Share of the logits that turn 0..turns-1 leaves soft: SOFT, stretched to so many turns."""
    at = (turn + 1) / turns * len(SOFT) - 1
    left = max(math.floor(at), 0)
    right = min(left + 1, len(SOFT) - 1)
    return SOFT[left] + max(at - left, 0) * (SOFT[right] - SOFT[left])


def hardened(logits: Tensor, share: float) -> Tensor:
    """Logits [out, in] of which at most `share`, those nearest to the middle, are still finite.

    Ties with the last of them stay soft.  Infinite logits stay, and get no gradient ever.
    """
    score = (rectified(logits) - 0.5).abs()
    decided = torch.full_like(logits, math.inf).copysign(logits)
    return torch.where(score > quantile(score, share), decided, logits)
