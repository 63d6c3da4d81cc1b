"""Summed: a knob for a layer of several parts: its codes move, and the factors beside them may.

W_q = Q(u) + B A + rest; single weights, and factors at a rate of 0, are the fixed rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aptq.core.parts import LowRank, Part
from aptq.core.plan import PartSpec
from aptq.engine.knobs import Knob
from aptq.engine.layer import Layer


class Summed(Knob):
    """An inner knob for the codes (None: they stay), and what is added to them."""

    rest: Tensor

    def __init__(
        self, inner: Knob | None, layer: Layer, factors: float, rest: Tensor, spec: PartSpec | None
    ) -> None:
        """factors: their rate, as a share of their own root mean square; rest [out, in] float32:
        the sum of the parts that stay.
        """
        super().__init__()
        self.inner, self.spec, own = inner, spec, layer.codes().parts
        self.held, self.others = own, [part for part in layer.parts if part not in own]
        self.register_buffer("rest", rest)
        self.left: nn.Parameter | None = None
        if spec is not None:
            found = next(part for part in layer.parts if isinstance(part, LowRank))
            left, right = found.factors()
            # both in units of their size, so that one rate fits every layer; of a left factor that
            # begins at 0 in units of what would make its product as large as what is missing
            self.sizes = [float(x.square().mean().sqrt()) for x in (left, right)]
            missing = float(layer.residual().square().mean().sqrt())
            self.sizes[0] = self.sizes[0] or missing / (self.sizes[1] * spec.rank**0.5)
            self.sizes = [max(size, 1e-12) for size in self.sizes]
            self.left = nn.Parameter(left / self.sizes[0])
            self.right = nn.Parameter(right / self.sizes[1])
            self.rate = factors
        self.steady = (inner is None or inner.steady) and (spec is None or spec.grid is None)

    def _factors(self) -> LowRank:
        """The factors as they will be stored."""
        assert self.spec is not None
        assert self.left is not None
        left, right = self.left.detach() * self.sizes[0], self.right.detach() * self.sizes[1]
        return LowRank.make(left.T, right, self.spec)

    def weight(self) -> Tensor:
        """The sum [out, in] float32; gradients pass the rounding of the factors."""
        total = self.rest if self.inner is None else self.rest + self.inner.weight()
        if self.left is None:
            return total
        sides = []
        for value, size, kept in zip(
            (self.left, self.right), self.sizes, self._factors().factors(), strict=True
        ):
            scaled = value * size
            sides.append(scaled + (kept - scaled).detach())
        return total + sides[0].T @ sides[1]

    def part(self) -> Part:
        """The codes alone; see `parts`."""
        return self.held[0] if self.inner is None else self.inner.part()

    @torch.no_grad()
    def parts(self) -> list[Part]:
        """All parts in their order."""
        others = [
            self._factors() if isinstance(part, LowRank) and self.left is not None else part
            for part in self.others
        ]
        return [self.part(), *others]

    def groups(self) -> list[dict[str, Any]]:
        """Those of the inner knob, and the factors."""
        found = [] if self.inner is None else self.inner.groups()
        if self.left is not None:
            found.append({"params": [self.left, self.right], "lr": self.rate})
        return found

    def begin(self, turn: int, turns: int) -> None:
        """A turn of the loop begins."""
        if self.inner is not None:
            self.inner.begin(turn, turns)

    def stepped(self) -> None:
        """A step was taken."""
        if self.inner is not None:
            self.inner.stepped()

    def penalty(self) -> Tensor | None:
        """What the inner knob adds to the loss."""
        return None if self.inner is None else self.inner.penalty()


def summed(layer: Layer, make: Callable[[Layer], Knob] | None, factors: float = 0.0) -> Knob | None:
    """The knob that `make` makes of a layer; of one with more parts, around them.

    make: None leaves the codes.  None where nothing may change.
    """
    spec = layer.target.part("lowrank") if factors else None
    known = any(isinstance(part, LowRank) for part in layer.parts)
    spec, own = spec if known else None, layer.codes()
    if len(own.parts) == len(layer.parts) or (make is None and spec is None):
        return make(layer) if make is not None else None
    moving = own.parts if make is not None else []
    stay = [x for x in layer.parts if x not in moving and not (spec and isinstance(x, LowRank))]
    rest = sum((part.dense() for part in stay), torch.zeros_like(layer.weight))
    return Summed(make(own) if make is not None else None, layer, factors, rest, spec)
