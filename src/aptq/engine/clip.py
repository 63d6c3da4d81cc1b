"""Clip and Folded: knobs that round to nearest in learned ranges, behind learned transformations.

The weights are never trained: only ranges of groups, and the scales and shifts of foldable pairs
(arXiv:2308.13137).  Until the first step a block is as it came, whatever rounded it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aptq.core.clipping import clipped, logits
from aptq.core.parts import Part, Quantized
from aptq.core.rounding import Scales
from aptq.core.soft import cast_ste, closed, extremes, rounded, spread
from aptq.core.transform import bounded
from aptq.engine.block import Block
from aptq.engine.fold import Pair
from aptq.engine.knobs import Knob, Knobs

# Adam's guard as both papers have it, torch's own: ranges and matrices have gradients from large to
# none, and full steps along the smallest are noise
GUARD = 1e-8


def untouched() -> Tensor:
    """The flag of a knob that has not been trained yet; on the CPU, where reading it is free."""
    return torch.ones((), dtype=torch.bool)


class Clip(Knob):
    """W_q = h (clamp(round(W / h) + z, 0, 2^b - 1) - z), h and z of ranges that are trained."""

    def __init__(self, weight: Tensor, before: Quantized, rate: float) -> None:
        """weight [out, in] float32; before: the part as it came, whose ranges are the start."""
        super().__init__()
        self.before, self.grid, self.rate = before, before.grid, rate
        self.show(weight)
        lower, upper = logits(before, self.low, self.high)
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper)  # [out, groups]
        self.untouched: Tensor
        self.register_buffer("untouched", untouched())

    def show(self, weight: Tensor) -> None:
        """This weight [out, in] is rounded from now on."""
        self.exact = weight
        self.low, self.high = extremes(weight, self.grid)

    def scales(self) -> Scales:
        """Scales and zeros as they are stored, in float32."""
        return clipped(self.low, self.high, self.lower, self.upper, self.grid)

    def weight(self) -> Tensor:
        """W_q [out, in] float32."""
        return rounded(*self._now(), self.grid)

    def _now(self) -> tuple[Tensor, Scales]:
        """(weight in units of its scales, these)."""
        scales = self.scales()
        return self.exact / spread(scales.scale, self.exact.shape[1], self.grid), scales

    @torch.no_grad()
    def part(self) -> Part:
        """Nearest codes in the ranges; before the first step the part as it came."""
        if self.untouched:
            return self.before
        return closed(*self._now(), self.grid)

    def groups(self) -> list[dict[str, Any]]:
        """Both logits."""
        found = {"params": [self.lower, self.upper], "lr": self.rate, "eps": GUARD}
        return [found] if self.rate else []

    def stepped(self) -> None:
        """From here on the ranges decide."""
        self.untouched.fill_(False)


class Transform(nn.Module):
    """What is trained of one pair: by default a scale for every channel, and shifts or none."""

    def __init__(self, pair: Pair, scale: Tensor, shift: Tensor | None, rate: float) -> None:
        """scale, shift: float32 [pair.width]."""
        super().__init__()
        self.pair, self.rate = pair, rate
        self.scale = nn.Parameter(scale)
        self.shift = None if shift is None else nn.Parameter(shift)

    def factor(self) -> Tensor:
        """What the source is divided by, see Pair.fold."""
        return self.scale

    @torch.no_grad()
    def stepped(self) -> None:
        """Keep the factor invertible."""
        self.scale.copy_(bounded(self.scale))


class Folded(Knobs):
    """Clips behind transformations; norms and biases are what the transformations make of them."""

    def __init__(
        self,
        block: Block,
        clips: Mapping[str, Clip],
        transforms: Sequence[Transform],
        norms: float = 0.0,
    ) -> None:
        """clips: by full name of the layer; norms: rate of the norm weights, 0 = as they are."""
        super().__init__(block, clips, norms)
        self.transforms = nn.ModuleList(transforms)
        self.untouched: Tensor
        self.register_buffer("untouched", untouched())
        skip = len(block.name) + 1
        self.clips = {f"{name[skip:]}.weight": (name, clip) for name, clip in clips.items()}
        self.first = {  # all that is folded, as it came
            name: self.clips[name][1].exact
            if name in self.clips
            else block.module.get_parameter(name).detach().float()
            for transform in transforms
            for name in transform.pair.names(block.module)
        }
        self.rest: dict[str, Tensor] = {}  # norms and biases as they are folded now

    @property
    def steady(self) -> bool:
        """No: the first step folds."""
        return False

    def groups(self) -> list[dict[str, Any]]:
        """Those of the knobs and of the transformations."""
        return super().groups() + [
            {"params": list(x.parameters()), "lr": x.rate, "eps": GUARD}
            for x in self._transforms()
            if x.rate
        ]

    def stepped(self) -> None:
        """A step was taken."""
        super().stepped()
        self.untouched.fill_(False)
        for transform in self._transforms():
            transform.stepped()

    def fold(self) -> None:
        """Show the clips what the transformations make of the weights."""
        now = {**self.first, **dict(zip(self.norm_names, self.norms, strict=True))}
        for transform in self._transforms():
            now |= transform.pair.fold(now, transform.factor(), transform.shift)
        self.rest = {name: value for name, value in now.items() if name not in self.clips}
        for name in now.keys() - self.rest.keys():
            self.clips[name][1].show(now[name])

    def values(self) -> dict[str, Tensor]:
        """Weights, norms and biases by name in block.module, float32."""
        self.fold()
        return super().values()

    def norm_values(self) -> dict[str, Tensor]:
        """Norms and biases that are trained or folded; none while the block is as it came."""
        if self.untouched and not self.training:
            return {}
        known = dict(self.block.module.named_parameters())
        return {name: cast_ste(value, known[name].dtype) for name, value in self.rest.items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Also: the layers' weights become the folded ones, which later stages compare with."""
        self.eval()
        self.fold()
        super().settle()
        if self.untouched:
            return
        for path, (name, clip) in self.clips.items():
            linear, layer = self.block.linears[name], self.block.layers[name]
            if path in self.first:
                layer.weight = clip.exact
                layer.bias = None if linear.bias is None else linear.bias.detach()
        self.block.enter(self.block.stream)  # what was seen of its inputs was before the fold

    def _transforms(self) -> list[Transform]:
        return list(self.transforms)  # type: ignore[arg-type]
