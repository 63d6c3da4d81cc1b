"""StackRule: a stacked sweep gives what every weight gets alone."""

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.linalg import damped_factor
from aptq.core.rounding import fit
from aptq.core.stack import StackRule
from aptq.core.sweep import GridRule, sweep

MIXES = [
    ("int4-g8-z", "int3-row", "int2-g16-z", "int8-g8"),
    ("int4-g8-fz", "int3-g8-z", "int5-row-fz", "int2-g7-z"),
]


@pytest.mark.parametrize("mix", MIXES)
def test_equals_separate_sweeps(mix: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 24, generator=generator)
    factor, _ = damped_factor(x.T @ x / 64)
    assert factor is not None
    grids = [Grid.parse(text) for text in mix]
    weights = [torch.randn(5 + i, 24, generator=generator) for i in range(len(grids))]
    scales = [fit(w, g) for w, g in zip(weights, grids, strict=True)]
    order = torch.randperm(24, generator=generator)
    stacked = sweep(torch.cat(weights), factor.inner, StackRule(grids, scales, 24), order=order)
    parts = stacked.rounded.split([len(w) for w in weights])
    for weight, grid, given, part in zip(weights, grids, scales, parts, strict=True):
        rule = GridRule(grid, (len(weight), 24), given)
        alone = sweep(weight, factor.inner, rule, order=order)
        assert torch.allclose(part, alone.rounded, atol=1e-5)
        assert (part == alone.rounded).float().mean() > 0.99
