"""Norm tweaking: only the norms of a quantized block move (arXiv:2309.02784).

Minimises the differences of mean and variance of every channel over the tokens (eq. 2) between the
original block and the quantized one on the same inputs, over the weights and biases [width] of the
block's norms.  Linears stay as the stages before left them; the last norm of the model is in no
block and stays too.  In a block with experts the norm in front of the router moves with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from aptq.engine.block import Block
from aptq.engine.knobs import Knob, Knobs, tunable_layers
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Reconstruct
from aptq.engine.stage import methods
from aptq.engine.tune import Pace, Tuned
from aptq.engine.window import Target, batch_of, held_out


@methods.register("norm_tweaking")
@dataclass(frozen=True, kw_only=True)
class NormTweaking(Reconstruct):
    """Norm weights of a block by Adam, its held-out loss deciding whether they are kept.

    Norms are trained in float32 and seen as the model's dtype holds them: moves of less than 0.4 %
    of a weight do not exist in bfloat16.
    """

    steps: int = 0  # 0 = as many as show every window once, the paper's one pass
    batch: int = 1  # the paper steps after every sample
    target: Target = "same"  # the paper's: this block's damage only
    loss: Literal["mse", "cosine", "distribution", "trimmed"] = "distribution"  # the paper's
    # rate in the first block; the largest of 1e-6 .. 3e-4 that are tried around the paper's 1e-5,
    # for smaller ones end below the resolution of bfloat16
    norms: float = 3e-4
    scale: float = 1.0  # later blocks: norms (1 + scale l / L) in block l of L; the paper hides its

    def __post_init__(self) -> None:
        """Raise ValueError for a scale out of range."""
        super().__post_init__()
        if self.scale < 0:
            raise ValueError(
                f"norm_tweaking: scale = {self.scale} is out of range\nit must be >= 0\n"
                "correct it in the recipe"
            )

    def rate(self, index: int, blocks: int) -> float:
        """Rate in block `index` of `blocks`."""
        return self.norms * (1.0 + self.scale * index / blocks)

    def knob(self, layer: Layer, generator: torch.Generator) -> Knob:
        """Layers have none."""
        raise AssertionError(f"norm_tweaking opens no layers, {layer.name} neither")

    def open(self, block: Block, generator: torch.Generator) -> Knobs:
        """The norms in front of, between and behind layers that are quantized."""
        for layer in tunable_layers(block).values():
            self.on_layer(layer)
        for group in block.groups:
            block.commit(group)
        knobs = Knobs(block, {}, self.rate(block.index, len(block.stream.calls)))
        if not knobs.norm_names:
            block.records.append({"stage": self.name, "norms": 0})
        return knobs

    def fit(
        self, blocks: Sequence[Block], knobs: Sequence[Knobs], generator: torch.Generator
    ) -> Tuned | None:
        """Run the loop, by default once over the windows; None where there are no norms."""
        if self.steps:
            return super().fit(blocks, knobs, generator)
        windows = len(blocks[0].stream.hidden)
        size = batch_of(self.batch, windows)
        once = (windows - held_out(windows, size, self.held)) // size
        return replace(self, steps=once).fit(blocks, knobs, generator)

    def pace(self) -> Pace:
        """Adam at a constant rate: the paper's."""
        return Pace(self.steps, "adam", "constant", checks=self.checks)
