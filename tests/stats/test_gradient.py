"""Gradient sums: profiles with holes, halves, merging, rows that do not count."""

import torch
from torch import Tensor

from aptq.engine.stat import Seen
from aptq.stats.gradient import Gradient

CPU = torch.device("cpu")
LENGTH = 8  # bins: 0, 1, 2..3, 4..7


def seen(grad: Tensor, position: list[int], half: int = 0) -> Seen:
    where = torch.tensor(position)
    return Seen(grad, where, LENGTH, torch.full_like(where, half), grad=grad)


def filled(*batches: Seen) -> Gradient:
    stat = Gradient().start(3, CPU)
    for batch in batches:
        stat.update(batch)
    return stat


def test_empty_bins_take_the_next_then_the_last_value() -> None:
    """Position 0 of a window may never be routed to an expert."""
    stat = filled(seen(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), [1, 2]))
    profile = stat.profile()
    assert profile is not None
    assert profile.tolist() == [5.0, 5.0, 9.0, 9.0]


def test_halves_add_up() -> None:
    one = seen(torch.tensor([[1.0, 2.0]]), [0], half=0)
    two = seen(torch.tensor([[3.0, 4.0]]), [0], half=1)
    stat = filled(one, two)
    rows = [stat.rows(half) for half in (None, 0, 1)]
    assert [row.tolist() for row in rows if row is not None] == [[5, 10], [1, 4], [9, 16]]
    profile = stat.profile(half=1)
    assert profile is not None
    assert profile.tolist() == [25.0] * 4


def test_workers_add_up() -> None:
    parts = [seen(torch.randn(8, 2), list(range(8)), half) for half in (0, 1)]
    whole, empty, one, two = filled(*parts), filled(), filled(parts[0]), filled(parts[1])
    empty.merge(one)
    empty.merge(two)
    assert all(torch.equal(empty.sums[name], value) for name, value in whole.tensors().items())
    assert float(one.sums["count"].sum()) == 8  # merging left the other worker as it was


def test_nothing_seen() -> None:
    assert filled().profile() is None
    assert filled().rows() is None
    odd = filled(seen(torch.ones(1, 2), [0], half=0))
    assert odd.profile(half=1) is None


def test_rows_that_do_not_count() -> None:
    grad = torch.tensor([[torch.inf, 1.0], [2.0, 0.0]])
    stat = filled(seen(grad, [0, 0]), seen(grad, [0, 1])._replace(position=None))
    profile = stat.profile()
    assert profile is not None
    assert profile.tolist() == [4.0] * 4
    assert float(stat.sums["dropped"]) == 3
