"""Factors made ahead: experts of a block have Hessians of one size, and a GPU factors many small
matrices at once in the time of a few.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from aptq.core.linalg import batch_count
from aptq.core.order import visiting_order
from aptq.engine.layer import Layer
from aptq.stats.hessian import Hessian, factor_all

AHEAD_BYTES = 256 << 20  # of means and factors that wait for their groups
FEWEST = 4  # matrices from which a batch is worth it


def ahead_count(size: int, device: torch.device) -> int:
    """How many H [size, size] are factored ahead, the first included; 0 where it does not pay.

    A CPU gains only at sizes that no model's layers have.
    """
    if device.type != "cuda":
        return 0
    return min(batch_count(size, device), AHEAD_BYTES // (2 * 4 * size * size))


def factor_ahead(
    groups: Iterable[Sequence[Layer]], need: Hessian, damp: float, columns: str
) -> None:
    """Make what `Hessian.factor` will be asked for by some groups of layers, the next one first.

    Only where that one has nothing yet, of Hessians of its size that have been collected; each
    keeps its own until its group is done and it is told to `forget`.
    """
    found: dict[int, tuple[Hessian, Layer]] = {}
    size = room = 0
    for layer in chain.from_iterable(groups):
        hessian = layer.stats.get(need)
        if not isinstance(hessian, Hessian) or layer.target.grid is None:
            continue
        if not found:
            size = layer.weight.shape[1]
            room = ahead_count(size, layer.weight.device)
            if hessian.cache or room < FEWEST:
                return
        if layer.weight.shape[1] == size and not hessian.cache:
            found.setdefault(id(hessian), (hessian, layer))
        if len(found) == room:
            break
    if len(found) < FEWEST:
        return
    orders = [_order(hessian, layer, columns) for hessian, layer in found.values()]
    factor_all([hessian for hessian, _ in found.values()], damp, orders)


def _order(hessian: Hessian, layer: Layer, columns: str) -> Tensor:
    """The order in which a sweep will visit the columns of a layer, LongTensor [in]."""
    assert layer.target.grid is not None, layer.target
    return visiting_order(hessian.matrix().diagonal(), layer.target.grid, columns)
