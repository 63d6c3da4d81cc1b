"""Stat: what a stage wants to know about the inputs of a group of layers.

A Stat is two things at once: a frozen set of options, compared by value, by which stages ask for
it, and (after `start`) the running sums of one group, or of one layer if it is `own`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aptq.model.watch import AttentionTrace


MOST_DROPPED = 0.1  # share of rows that may hold NaN or Inf, as in ExLlamaV3


class Seen(NamedTuple):
    """What a Stat is shown for one batch of one group, or of one layer if it is `own`."""

    x: Tensor  # [rows, in] input rows in the model's dtype
    position: Tensor | None  # [rows] int64: each row's token in its window; None = no tokens
    length: int  # tokens in a window
    half: Tensor | None = None  # [rows] int64: parity of the row's window, for split-half noise
    original: Tensor | None = None  # [rows, in] the same rows in the uncompressed model
    # where rows are whole windows in order: how a window's tokens weigh, as (weight, tokens) of
    # stretches of it, known without asking the device
    stretches: Sequence[tuple[float, int]] | None = None
    # own statistics only (weight: all), None where it is not known:
    weight: Tensor | None = None  # [rows] float32: weights by the layer's profile
    grad: Tensor | None = None  # [rows, out] d(nats of all tokens) / d(output), model's dtype
    attention: AttentionTrace | None = None  # how its unit's output depends on the layer's


@dataclass(frozen=True, kw_only=True)
class Stat(ABC):
    """Base of all statistics: sums over batches, so that batches may be merged in any grouping."""

    sums: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def own(self) -> bool:
        """Does every layer of a group need sums of its own?"""
        return False

    @property
    def gradient(self) -> bool:
        """Does `update` read output gradients?  Only the backward walk has them."""
        return False

    @property
    def weighted(self) -> bool:
        """Does `update` read weights of rows?  They come from profiles, measured before."""
        return False

    @property
    def compares(self) -> bool:
        """Does `update` read what the uncompressed model computes?"""
        return False

    @property
    def watches(self) -> bool:
        """Does `update` read what the attention of the block computed?"""
        return False

    @abstractmethod
    def start(self, columns: int, device: torch.device) -> Self:
        """Empty sums for inputs of width `columns`."""

    @abstractmethod
    def update(self, seen: Seen) -> None:
        """Add one batch."""

    def merge(self, other: Self) -> None:
        """Add the sums of another worker, in place."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for storing and for moving between machines."""
        return dict(self.sums)

    def forget(self) -> None:  # noqa: B027  # most keep nothing of the kind
        """Drop what was derived from the sums; the group's layers are done for now."""

    @abstractmethod
    def nbytes(self, columns: int) -> int:
        """Memory of the sums for inputs of width `columns`; collection is sliced by it."""


@dataclass(frozen=True, kw_only=True)
class GradientStat(Stat):
    """Base of those that read the gradient of a layer's output: only the backward walk has it."""

    @property
    def own(self) -> bool:
        """Every layer has an output."""
        return True

    @property
    def gradient(self) -> bool:
        """Yes."""
        return True
