"""Layers with statistics for stages that start from an earlier one."""

import torch

from aptq.core.grid import Grid
from aptq.core.plan import PartSpec, Target
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.stat import Seen
from aptq.stats.hessian import Hessian

CPU = torch.device("cpu")


def layer(grid: str, need: Hessian, *, seed: int = 0, after: str = "") -> Layer:
    """A layer [24, 40] whose inputs moved a little from the original ones; `after` a stage."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(40, 40, generator=generator) / 40**0.5
    size = torch.exp(torch.randn(40, generator=generator))
    x0 = (torch.randn(256, 40, generator=generator) @ mix + 0.3) * size
    x = x0 + 0.1 * size * torch.randn(256, 40, generator=generator)
    W = torch.randn(24, 40, generator=generator)
    made = Layer("block.linear", "up", W, None, Target((PartSpec(Grid.parse(grid)),)))
    for stat in {need, Hessian()}:
        found = stat.start(40, CPU)
        position = torch.arange(256) % 32
        found.update(Seen(x, position, 32, original=x0, weight=1.0 / (1 + position)))
        made.stats[stat] = found
    return made if not after else methods.get(after)().on_layer(made)
