"""EndToEnd: the base of stages that tune all blocks together to the original's next tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.engine.block import Block
from aptq.engine.chain import Chain
from aptq.engine.compressed import Compressed
from aptq.engine.knobs import Knobs
from aptq.engine.layer import Layer
from aptq.engine.reconstruct import Together, nearest, shares
from aptq.engine.stage import Stage
from aptq.engine.tune import Pace, batches, tune
from aptq.engine.window import batch_of, held_out


@dataclass(frozen=True, kw_only=True)
class EndToEnd(Stage):
    """Minimise KL(original || compressed) of the next tokens, a mean over all positions."""

    epochs: float = 1.0  # passes over the windows; EfficientQAT's, which has forty times as many
    steps: int = 0  # instead of epochs; 0 = as epochs say
    batch: int = 8  # windows a step; EfficientQAT takes 32 of twice the length
    held: float = 0.08  # share of the windows held out: 8 of 96
    checks: int = 4  # times that their loss is asked for
    warm: float = 0.03  # share of the steps in which rates rise; EfficientQAT's

    def __post_init__(self) -> None:
        """Raise ValueError for counts that are none."""
        counts, shares = (self.batch, self.checks), (self.steps, self.epochs)
        if min(counts) < 1 or min(shares) < 0 or not 0 <= self.held < 1:
            raise ValueError(
                "end-to-end tuning: an option is out of range\n"
                f"steps = {self.steps}, epochs = {self.epochs} >= 0; batch = {self.batch}, "
                f"checks = {self.checks} >= 1; held = {self.held} [0..1)\ncorrect it in the recipe"
            )

    @property
    def changes(self) -> bool:
        """A single layer is only rounded where no stage before did."""
        return False

    @property
    def whole(self) -> bool:
        """It works on the whole model."""
        return True

    @property
    def reads(self) -> bool:
        """It looks at the calibration windows."""
        return True

    @property
    def targets(self) -> int:
        """The original's last hidden states."""
        return 1

    @property
    def tuning(self) -> float:
        """The block as it is opened: float32 weight, latent, and what it runs with."""
        return 10.0

    def passes(self, windows: int) -> float:
        """Forward, forward again with gradients, and backward of every step; the original's."""
        inside = windows - held_out(windows, batch_of(self.batch, windows), self.held)
        return 4.0 * (self.steps * self.batch or self.epochs * inside) + windows

    @abstractmethod
    def open(self, block: Block) -> Knobs:
        """What may change in a block."""

    def pace(self, steps: int) -> Pace:
        """AdamW, cosine with a warm-up, gradients scaled down to a norm of 0.3: EfficientQAT's."""
        return Pace(steps, "adamw", "cosine", self.warm, checks=self.checks, norm=0.3)

    def on_layer(self, layer: Layer) -> Layer:
        """Round to nearest where no stage before did."""
        return nearest(layer)

    def on_model(self, compressed: Compressed) -> None:
        """Tune all blocks."""
        count, model, stream = len(compressed.ids), compressed.model, compressed.stream()
        text = count - compressed.written  # what counts is the loss on what people wrote
        size = batch_of(self.batch, text)
        stream.learn(model, [size])
        wanted = compressed.original()  # before the blocks are there
        knobs = []
        for index in range(model.blocks):
            knobs.append(self.open(compressed.open(index, stream)))
        generator = torch.Generator().manual_seed(0)
        inside, outside = shares(text, size, self.held)
        inside = torch.cat([inside, torch.arange(text, count)])
        order = batches(len(inside), min(size, len(inside)), generator)
        chain = Chain(compressed, knobs, stream, wanted)
        steps = self.steps or round(self.epochs * len(inside) / size)

        def gradients(step: int) -> Tensor:
            compressed.report(self.name, step + 1, steps)
            return chain.gradients(inside[next(order)])

        subject, pace = Together(knobs), self.pace(steps)
        if subject.groups() and steps:
            tuned = tune(subject, gradients, lambda: chain.measure(outside, size), pace)
            knobs[-1].block.records.append({"stage": self.name, **vars(tuned)})
        chain.close()
        stream.close()
        wanted.close()
        for own in knobs:
            own.to(compressed.device)
            own.block.module.to(compressed.device)
            own.settle()
            compressed.keep(own.block)
            model.unload(own.block.index)
