"""Stage: what every compression method is.

A subclass is a frozen dataclass of options with one hook overridden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from aptq.core.parts import Dense
from aptq.core.plan import Target
from aptq.engine.block import Block
from aptq.engine.compressed import Compressed
from aptq.engine.layer import Layer
from aptq.engine.stat import Stat
from aptq.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe.  Most methods override `needs` and `on_layer` only."""

    @property
    def name(self) -> str:
        """The name in recipes and reports."""
        return methods.name_of(type(self))

    @property
    def window(self) -> tuple[int, int]:
        """(blocks that `on_blocks` gets together, blocks that are finished after each call)."""
        return 1, 1

    @property
    def changes(self) -> bool:
        """Does `on_layer` do anything to a layer that has parts already?"""
        return True

    @property
    def reads(self) -> bool:
        """Does the stage look at calibration data?"""
        return bool(self.needs()) or self.original

    @property
    def original(self) -> bool:
        """Does the stage look at the uncompressed block and its inputs?"""
        return any(need.compares for need in self.needs())

    @property
    def weighted(self) -> bool:
        """Does the stage weight positions by profiles of output gradients?"""
        return any(need.weighted for need in self.needs())

    @property
    def whole(self) -> bool:
        """Does the stage work on the whole compressed model, after the walk: `on_model`?"""
        return False

    @property
    def folds(self) -> bool:
        """Does the stage change the weights that a layer's parts shall add up to?"""
        return False

    @property
    def traced(self) -> bool:
        """Does the stage need places that a backward walk has found: `places`?"""
        return False

    @property
    def marks(self) -> bool:
        """Does the stage only choose outliers, for targets that have some?"""
        return False

    @property
    def adds(self) -> bool:
        """Does the stage only add parts, by what those before leave of the weight: `extend`?"""
        return False

    @property
    def targets(self) -> int:
        """Copies of the hidden states of all windows that the stage makes for itself."""
        return 0

    @property
    def tuning(self) -> float:
        """Bytes for each weight of the blocks that are tuned together, besides their own."""
        return 0.0

    def passes(self, windows: int) -> float:
        """Windows that go through every block besides what `needs` takes, in forward passes."""
        return 0.0

    def batches(self, windows: int) -> tuple[int, ...]:
        """Batch sizes with which `on_blocks` calls blocks itself, of so many windows."""
        return ()

    def needs(self) -> tuple[Stat, ...]:
        """Statistics that `on_layer` reads from `layer.stats`."""
        return ()

    def on_blocks(self, blocks: Sequence[Block]) -> None:
        """Work on loaded blocks; by default group by group: collect, `on_group`, commit."""
        for block in blocks:
            for group in block.groups:
                layers = block.open_layers(group)
                if not layers:
                    continue
                block.collect(self.needs(), group)
                self.ahead(map(block.open_layers, block.alike(group)))
                block.layers |= {layer.name: layer for layer in self.on_group(layers)}
                block.commit(group)
            block.close_stage()

    def ahead(self, groups: Iterable[Sequence[Layer]]) -> None:
        """Share work between groups: the one that is next for `on_group`, and those like it behind
        (experts), whose statistics may be known already.
        """

    def on_model(self, compressed: Compressed) -> None:
        """Work on all blocks when the stages before have finished them."""

    def objective(self, layer: Layer) -> float:
        """What the method minimises, for this layer as it stands; by default |W - Q|^2."""
        return float(layer.residual().square().sum())

    def on_layer(self, layer: Layer) -> Layer:
        """Compress one layer; returned, not only mutated, so that it may run elsewhere."""
        return layer

    def on_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """`on_layer` of layers that read the same input; methods override it to share work."""
        return [self.on_layer(layer) for layer in layers]

    def attempt(self, layer: Layer, targets: Sequence[Target]) -> Iterator[Tensor]:
        """The dense weights [out, in] that `on_layer` makes of a layer at each of some targets.

        The layer gets no parts.  Methods override it where many targets share work.
        """
        for target in targets:
            yield self.on_layer(replace(layer, target=target, parts=[])).dense()

    def extend(self, layer: Layer, base: Tensor, targets: Sequence[Target]) -> Iterator[Tensor]:
        """The dense weights of some targets where earlier stages made `base` [out, in] of all.

        For stages that only add; they override it where many targets share work.
        """
        for target in targets:
            made = replace(layer, target=target, parts=[Dense(base)])
            yield self.on_layer(made).dense()

    def places(self, layer: Layer, count: int) -> Tensor | None:
        """Where `traced` stages keep `count` single weights, one bit each, uint8
        [out, ceil(in / 8)]; None where the walk has told nothing.
        """
        return None


methods: Registry[Stage] = Registry("aptq.methods")
