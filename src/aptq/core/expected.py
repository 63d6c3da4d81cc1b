"""Expected rounding error of a grid on normal weights: orders grids where nothing is measured."""

from statistics import NormalDist

from aptq.core.plan import Candidate, Shapes, target_of


def expected_error(candidate: Candidate, shapes: Shapes) -> float:
    """Mean squared rounding error of standard normal weights, averaged over the layers.

    A step of width s rounds with error s^2 / 12; s is the expected range of a group's weights over
    its number of steps.
    """
    grid = target_of(candidate).grid  # what is added to codes is left out
    if grid is None or grid.dense:
        return 0.0
    total = sum(out * columns for out, columns in shapes.values())
    lost = 0.0
    for out, columns in shapes.values():
        group = min(grid.group or columns, columns)
        if grid.zero == "none":  # full range: the extreme weight takes the lowest of 2^bits levels
            step = 2 * _extreme(2 * group) / grid.levels
        else:
            step = 2 * _extreme(group) / (grid.levels - 1)
        lost += out * columns * step**2 / 12
    return lost / total


def _extreme(count: int) -> float:
    """Expected largest of `count` standard normal numbers (Blom's approximation)."""
    return max(NormalDist().inv_cdf((count - 0.375) / (count + 0.25)), 0.5)
