"""HQQ as a stage: outliers are forgiven, zeros move, grids without a zero are refused."""

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.plan import PartSpec, Target
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.methods.quantize.hqq import HQQ, group_mean, shrink


def layer(grid: str, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(16, 50, generator=generator)
    W[torch.rand(16, 50, generator=generator) < 0.02] *= 6
    return Layer("block.linear", "up", W, None, Target((PartSpec(Grid.parse(grid)),)))


@pytest.mark.parametrize("grid", ["int3-g16-fz", "int4-g16-z", "int2-row-fz"])
def test_not_worse_than_rtn_in_its_objective(grid: str) -> None:
    stage, rtn = HQQ(), methods.get("rtn")()
    ours = sum(stage.objective(stage.on_layer(layer(grid, s))) for s in range(8))
    theirs = sum(stage.objective(rtn.on_layer(layer(grid, s))) for s in range(8))
    assert ours <= theirs
    if grid.endswith("fz"):
        assert ours < 0.99 * theirs


def test_shrink_is_the_generalised_threshold() -> None:
    error = torch.tensor([0.0, 0.01, -0.05, 2.0, -3.0])
    found = shrink(error, beta=10.0, p=0.7)
    expected = [0.0, 0.0, 0.0, 2 - 2**-0.3 / 10, -3 + 3**-0.3 / 10]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_group_mean_with_a_shorter_last_group() -> None:
    grid = Grid("int4", 4, "float")
    values = torch.arange(20.0).view(2, 10)
    found = group_mean(values, grid.group_of(10), grid)
    expected = torch.stack([part.mean(1) for part in values.split(4, 1)], 1)
    torch.testing.assert_close(found, expected)


def test_grid_without_a_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="zero"):
        HQQ().on_layer(layer("int4-g16"))
