"""Shown: which statistics of which layer see a batch, and with what weights of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from aptq.engine.layer import Layer
from aptq.engine.stat import Seen, Stat
from aptq.model.watch import Lookup


class Shown(NamedTuple):
    """Started statistics of a layer, or those that its group shares."""

    layer: Layer
    stats: dict[Stat, Stat]
    weights: Tensor | None  # [length] of the layer's rows by their position, for own statistics
    stretches: Sequence[tuple[float, int]]  # the same, as Seen has it

    @classmethod
    def of(cls, layer: Layer, stats: dict[Stat, Stat], weights: Tensor | None) -> Shown:
        """With the stretches of the weights [length]."""
        values = [] if weights is None else weights.tolist()
        alike = [(value, len(list(run))) for value, run in groupby(values)]
        return cls(layer, stats, weights, alike)

    def show(self, seen: Seen, trace: Lookup) -> None:
        """Show a batch to the statistics, own ones with what is known of their layer."""
        if self.weights is not None and seen.position is not None:
            seen = seen._replace(weight=self.weights[seen.position])
            if seen.stretches is not None:
                seen = seen._replace(stretches=self.stretches)
        for need, stat in self.stats.items():
            if need.watches:
                stat.update(seen._replace(attention=trace(self.layer.name)))
            else:
                stat.update(seen)
