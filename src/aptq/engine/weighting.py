"""Weights of rows by their position, from profiles: for layers, and for groups that share sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aptq.core.profile import Profiles, row_weights
from aptq.engine.layer import Layer
from aptq.engine.stream import Stream


class Weighting:
    """Row weights of one block.  A layer's own profile goes before that of the profiles given."""

    def __init__(self, profiles: Profiles, layers: Mapping[str, Layer], stream: Stream) -> None:
        self.profiles, self.layers, self.stream = profiles, layers, stream

    def of(self, path: str) -> Tensor | None:
        """Weight of a row by its position, [length], if the linear has a profile."""
        profile, window = self.profiles.of.get(path), self.profiles.window
        if path in self.layers:
            profile, window = self.layers[path].profile, self.layers[path].window
        if profile is None:
            return None
        return row_weights(profile, window, self.stream.length).to(self.stream.device)

    def counted(self, layer: Layer) -> Tensor | None:
        """The same; a layer without profile where others have one is weighted alike and counted.

        It is an expert that got no token when the profiles were taken.
        """
        others = [*self.profiles.of.values(), *(x.profile for x in self.layers.values())]
        if layer.profile is None and any(profile is not None for profile in others):
            layer.counts["unweighted"] = 1.0
            return torch.ones(self.stream.length, device=self.stream.device)
        return self.of(layer.name)

    def mean(self, layers: Sequence[Layer]) -> Tensor | None:
        """For statistics that layers share: the mean of what each of them asks for, [length]."""
        found = [weights for x in layers if (weights := self.counted(x)) is not None]
        return torch.stack(found).mean(dim=0) if found else None
