"""HalfHessian: a Hessian of every other window; two of them give the noise of what uses them."""

from dataclasses import dataclass

import torch

from aptq.engine.layer import Layer
from aptq.engine.stat import Seen
from aptq.stats.hessian import Hessian


@dataclass(frozen=True, kw_only=True)
class HalfHessian(Hessian):
    """The second moment of the rows of windows whose number has this parity."""

    parity: int = 0

    def update(self, seen: Seen) -> None:
        """Add the rows of this half; rows that are no tokens in order are dealt out in turn."""
        half = torch.arange(len(seen.x), device=seen.x.device) % 2
        at = (half if seen.half is None else seen.half) == self.parity
        position = None if seen.position is None else seen.position[at]
        super().update(Seen(seen.x[at], position, seen.length))


HALVES = (HalfHessian(parity=0), HalfHessian(parity=1))


def halves(layer: Layer) -> list[HalfHessian]:
    """What a layer has of the two."""
    held = [layer.stats[half] for half in HALVES]
    return [half for half in held if isinstance(half, HalfHessian)]
