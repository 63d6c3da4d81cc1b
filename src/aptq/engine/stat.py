"""Stat: what a stage wants to know about the inputs of a group of layers.

A Stat is two things at once: a frozen set of options, compared by value, by which stages ask for
it, and (after `start`) the running sums of one group.  A group's layers share one set of sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Seen(NamedTuple):
    """What a Stat is shown for one batch of one group."""

    x: Tensor  # [rows, in] input rows in the model's dtype
    position: (
        Tensor | None
    )  # [rows] int64: index of each row's token in its window; None = rows are not tokens
    length: int  # tokens in a window


@dataclass(frozen=True, kw_only=True)
class Stat(ABC):
    """Base of all statistics: sums over batches, so that batches may be merged in any grouping."""

    @abstractmethod
    def start(self, columns: int, device: torch.device) -> Self:
        """Empty sums for inputs of width `columns`."""

    @abstractmethod
    def update(self, seen: Seen) -> None:
        """Add one batch."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the sums of another worker, in place."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums by name, for storing and for moving between machines."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was derived from the sums; the group's layers are done for now."""

    @abstractmethod
    def nbytes(self, columns: int) -> int:
        """Memory of the sums for inputs of width `columns`; collection is sliced by it."""
