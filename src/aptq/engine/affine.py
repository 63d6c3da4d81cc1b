"""AffineKnob: a weight on an integer grid, of which codes, scales and zeros may move or some.

W_q = s (clamp(round(u) + z, 0, 2^b - 1) - z) with straight-through gradients (arXiv:2407.11062);
u [out, in] are the weights in units of their scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aptq.core.parts import Part, Quantized
from aptq.core.rounding import Scales
from aptq.core.soft import closed, opened, rounded, spread, stored_scale, stored_zero
from aptq.engine.knobs import Knob


class AffineKnob(Knob):
    """Rates of 0 leave the weights, the scales or the zeros as they are."""

    steady = True
    latent: Tensor
    gain: Tensor
    zero: Tensor | None

    def __init__(
        self,
        part: Quantized,
        weight: Tensor,
        weights: float,
        scales: float,
        zeros: float,
        *,
        follow: bool,
    ) -> None:
        """weight [out, in] float32: what the part stands for; rates of the first step.

        weights: in steps of the grid; scales: as a share of each; zeros: in steps.  follow: codes
        follow a moving scale, u = W / s, else u itself is trained or fixed.
        """
        super().__init__()
        self.grid, self.follow = part.grid, follow
        self.rates = {"latent": weights, "gain": scales, "zero": zeros}
        latent, (scale, zero) = opened(part, weight if weights or follow else None)
        self.first: Tensor
        self.register_buffer("first", scale)  # the unit of the gain, and of W where codes follow
        self._hold("latent", latent)
        self._hold("gain", torch.ones_like(scale))
        self._hold("zero", zero)

    def _hold(self, name: str, value: Tensor | None) -> None:
        """A parameter where it is trained, a buffer where it is not."""
        if value is not None and self.rates[name] > 0:
            setattr(self, name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _now(self) -> tuple[Tensor, Scales]:
        """(u, scales and zeros as they are stored), float32."""
        scale = stored_scale(self.first * self.gain, self.grid)
        latent = self.latent
        if self.follow:
            latent = latent * spread(self.first / scale, latent.shape[1], self.grid)
        return latent, Scales(scale, stored_zero(self.zero, self.grid))

    def weight(self) -> Tensor:
        """W_q [out, in] float32."""
        return rounded(*self._now(), self.grid)

    @torch.no_grad()
    def part(self) -> Part:
        """Codes, scales and zeros as they are now."""
        return closed(*self._now(), self.grid)

    def groups(self) -> list[dict[str, Any]]:
        """What is trained, with a rate each."""
        known = dict(self.named_parameters())
        return [{"params": [value], "lr": self.rates[name]} for name, value in known.items()]
