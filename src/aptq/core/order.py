"""In what order a sweep visits the columns, and what an error of each of them costs."""

import torch
from torch import Tensor

from aptq.core.grid import Grid


def visiting_order(diagonal: Tensor, grid: Grid, columns: str) -> Tensor:
    """Column ids [in] in the order of the sweep; diagonal of H [in].  Ties go to the lower id."""
    count = len(diagonal)
    natural = torch.arange(count, device=diagonal.device)
    if columns == "natural":
        return natural
    inside = diagonal.argsort(descending=True, stable=True)
    if columns == "activation" or grid.group == 0:
        return inside
    owner = natural // grid.group
    peak = torch.zeros(grid.groups(count), dtype=diagonal.dtype, device=diagonal.device)
    peak.scatter_reduce_(0, owner, diagonal, "amax")
    rank = peak.argsort(descending=True, stable=True).argsort()
    return inside[rank[owner[inside]].argsort(stable=True)]


def error_weights(H: Tensor, U: Tensor, order: Tensor, importance: str) -> Tensor | None:
    """What one squared rounding error in each column costs, [in] in natural order."""
    if importance == "equal":
        return None
    if importance == "diagonal":
        return H.diagonal()
    weights = torch.empty_like(U[0])
    weights[order] = U.diagonal().square().reciprocal()
    return weights
