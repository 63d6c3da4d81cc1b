"""CBQ: low-rank rounding over windows of blocks that overlap (arXiv:2312.07950).

Minimises E (1 + penalty * R) over factors A1 [out, r], A2 [r, in] and scale gains [out, groups] of
all layers in a window of blocks: W_q = gain s (lower + h(t (V0 + A1 A2)) - z), E the distance to
the original window's output, R the mean of 1 - |2 h - 1|^beta, V0 the start's logits; t grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aptq.core.adaround import annealed, rectified, undecided
from aptq.core.outliers import largest_kept
from aptq.core.parts import Quantized, nearest_part
from aptq.engine.choice import ChoiceKnob
from aptq.engine.knobs import Knob, part_in
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Reconstruct
from aptq.engine.stage import methods
from aptq.engine.tune import Pace
from aptq.engine.window import Target


@methods.register("cbq")
@dataclass(frozen=True, kw_only=True)
class CBQ(Reconstruct):
    """Cross-block windows with low-rank rounding; outliers of the weights are cut off before.

    A block that a second window holds starts there from its hard codes, opened again: those that
    training moved lean towards the original weight, but what was undecided is not remembered.  So
    no window leaves a block worse than the one before did.  Activations are not quantized.
    """

    steps: int = 400  # three epochs of 128 windows, one at a time, as the paper's digests have it
    blocks: int = 2  # the paper's; each is in two windows
    target: Target = "both"  # the sum that OmniQuant and LRQuant take; the paper's is "same"
    # the paper's is "channels", in which one massive channel hides the others
    loss: Literal["mse", "cosine", "distribution", "trimmed", "channels"] = "cosine"
    rank: int = 8  # of the logits' change; 0 = full: AdaRound.  The paper's is not known
    rounding: float = 3e-2  # rate of the factors; not known, the best of 3e-3 to 3e-2
    scales: float = 1e-3  # rate of the scales, as a share of each; not known, TesseraQ's
    penalty: float = 0.01  # share of the loss that a layer's undecided codes add; not known
    # logits are multiplied by up to this, so that low ranks end hard too: what is decided is their
    # sign; 1 = the paper's, which leaves them soft (tiny model at 2 bits: worse than the start)
    sharpen: float = 100.0
    truncate: bool = True  # outliers of the weights, where no stage before made parts; the paper's

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be."""
        super().__post_init__()
        if min(self.rank, self.rounding, self.scales, self.penalty) < 0 or self.sharpen < 1:
            raise ValueError(
                "cbq: an option is out of range\n"
                f"rank = {self.rank}, rounding = {self.rounding}, scales = {self.scales}, "
                f"penalty = {self.penalty} >= 0; sharpen = {self.sharpen} >= 1\n"
                "correct it in the recipe"
            )

    def on_layer(self, layer: Layer) -> Layer:
        """Nearest codes in the ranges that are left without outliers, if there are no parts."""
        if not layer.parts and self.truncate:
            grid = layer.target.grid
            assert grid is not None, layer.name
            weight = self.without_outliers(layer)
            layer.counts["truncated"] = float((weight != layer.weight).sum())
            layer.parts.append(nearest_part(weight, grid))
        return super().on_layer(layer)

    def objective(self, layer: Layer) -> float:
        """Of a single layer: |W - Q|^2 with W as it is without its outliers."""
        return float((self.without_outliers(layer) - layer.dense()).square().sum())

    def without_outliers(self, layer: Layer) -> Tensor:
        """The weight [out, in], its outliers cut down to the largest value that is none."""
        bound = largest_kept(layer.weight) if self.truncate else torch.inf
        return layer.weight.clamp(-bound, bound)

    def knob(self, layer: Layer, generator: torch.Generator) -> Knob:
        """Codes and scales of the layer."""
        part = part_in(self.on_layer(layer))
        assert part is not None, layer.name
        return LowRank(part, layer.weight, self, generator)

    def pace(self) -> Pace:
        """Adam, cosine to a twentieth."""
        return Pace(self.steps, "adam", "cosine", checks=self.checks)


class LowRank(ChoiceKnob):
    """Logits V0 + A1 A2: r (out + in) numbers are trained instead of out in."""

    def __init__(
        self, part: Quantized, weight: Tensor, stage: CBQ, generator: torch.Generator
    ) -> None:
        """part: the start; weight [out, in] float32: what it stands for."""
        super().__init__(part)
        self.stage, self.done = stage, 0  # steps: the schedule goes on when values are restored
        first = self.start(part, weight)
        rank = stage.rank if stage.rank < min(part.shape) else 0
        self.factors = nn.ParameterList()
        if rank:
            self.first: Tensor
            self.register_buffer("first", first)
            left = torch.randn(part.shape[0], rank, generator=generator).to(first) / rank**0.5
            self.factors.extend([left, first.new_zeros(rank, part.shape[1])])
        else:
            self.factors.append(first)
        self.factor = nn.Parameter(torch.ones_like(self.unit))

    def logits(self) -> Tensor:
        """t V [out, in]."""
        left, *right = self.factors
        logits: Tensor = self.first + left @ right[0] if right else left
        return logits * self.sharp()

    def sharp(self) -> float:
        """What logits are multiplied by now: from 1, geometrically, to the last step's."""
        share = min(self.done / max(self.stage.steps, 1), 1.0)
        return float(self.stage.sharpen**share)

    def gain(self) -> Tensor:
        """The trained factor."""
        return self.factor

    def stepped(self) -> None:
        """Count, for the schedule of beta."""
        self.done += 1

    def penalty(self) -> Tensor | None:
        """How undecided the codes are, after the first fifth of the steps."""
        beta = annealed(self.done, self.stage.steps)
        if beta is None or not self.stage.penalty:
            return None
        return self.stage.penalty * undecided(rectified(self.logits()), beta)

    def groups(self) -> list[dict[str, Any]]:
        """Factors and scales."""
        return [
            {"params": list(self.factors), "lr": self.stage.rounding},
            {"params": [self.factor], "lr": self.stage.scales},
        ]
