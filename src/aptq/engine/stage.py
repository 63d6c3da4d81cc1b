"""Stage: what every compression method is.

A subclass is a frozen dataclass of options with one hook overridden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from aptq.core.plan import Target
from aptq.engine.block import Block
from aptq.engine.layer import Layer
from aptq.engine.stat import Stat
from aptq.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe.  Most methods override `needs` and `on_layer` only."""

    def needs(self) -> tuple[Stat, ...]:
        """Statistics that `on_layer` reads from `layer.stats`."""
        return ()

    def on_blocks(self, blocks: Sequence[Block]) -> None:
        """Work on loaded blocks; by default group by group: collect, `on_layer`, commit."""
        for block in blocks:
            for group in block.groups:
                layers = block.open_layers(group)
                if not layers:
                    continue
                block.collect(self.needs(), group)
                for layer in layers:
                    block.layers[layer.name] = self.on_layer(layer)
                block.commit(group)
            block.close_stage()

    def objective(self, layer: Layer) -> float:
        """What the method minimises, for this layer as it stands; by default |W - Q|^2."""
        return float(layer.residual().square().sum())

    def on_layer(self, layer: Layer) -> Layer:
        """Compress one layer; returned, not only mutated, so that it may run elsewhere."""
        return layer

    def attempt(self, layer: Layer, targets: Sequence[Target]) -> Iterator[Tensor]:
        """The dense weights [out, in] that `on_layer` makes of a layer at each of some targets.

        The layer gets no parts.  Methods override it where many targets share work.
        """
        for target in targets:
            yield self.on_layer(replace(layer, target=target, parts=[])).dense()


methods: Registry[Stage] = Registry("aptq.methods")
