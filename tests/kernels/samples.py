"""Random parts for the tests of kernels, store and runtime."""

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import Part, part_of
from aptq.core.rounding import fit, snap


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(text: str, weight: Tensor) -> Part:
    """`weight` [out, in] rounded to the nearest values of the grid `text`."""
    grid = Grid.parse(text)
    scales = fit(weight, grid)
    return part_of(snap(weight, scales, grid), scales, grid)


def sample(text: str, out: int, columns: int) -> Part:
    """A random weight [out, columns] on the grid `text`."""
    return make(text, 0.05 * randn(out, columns))
