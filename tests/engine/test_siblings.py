"""Rows that are not finite, and experts that no row reached: counted, bounded, made up for."""

import math

import pytest
import torch

from aptq.core.plan import Target
from aptq.engine.layer import Layer
from aptq.engine.siblings import lend
from aptq.engine.stat import Seen
from aptq.engine.stream import Stream
from aptq.failures import Unsound
from aptq.model.dry import Call
from aptq.stats.hessian import Hessian

NEED = Hessian()
DRAW = torch.Generator().manual_seed(0)


def shown(x: torch.Tensor) -> Hessian:
    stat = NEED.start(x.shape[1], torch.device("cpu"))
    if len(x):
        stat.update(Seen(x, None, 4))
    return stat


def expert(number: int, x: torch.Tensor, module: str = "mlp.experts") -> list[Layer]:
    """Two layers that share an input."""
    stat, target = shown(x), Target.parse("int4-row")
    names = [f"model.layers.0.{module}.{number}.{role}_proj" for role in ("gate", "up")]
    layers = [Layer(name, "up", torch.ones(2, 3), None, target) for name in names]
    for layer in layers:
        layer.stats[NEED], layer.counts["tokens"] = stat, float(len(x))
    return layers


def test_an_idle_expert_has_the_hessian_of_all_its_siblings() -> None:
    rows = [torch.randn(n, 3, generator=DRAW) for n in (5, 0, 7)]
    groups = [expert(number, x) for number, x in enumerate(rows)]
    other = expert(0, torch.randn(9, 3, generator=DRAW), "other.experts")
    lend([*groups, other])
    found = groups[1][0].stats[NEED]
    assert isinstance(found, Hessian)
    assert torch.allclose(found.matrix(), shown(torch.cat(rows)).matrix())
    assert [layer.counts for layer in groups[1]] == [
        {"tokens": 0.0, "idle": 1.0, "fallbacks": 1.0}
    ] * 2
    assert groups[0][0].counts == {"tokens": 5.0}


def test_experts_without_busy_siblings_stay_empty() -> None:
    groups = [expert(number, torch.zeros(0, 3)) for number in range(2)]
    lend(groups)
    assert groups[0][0].stats[NEED].empty  # type: ignore[attr-defined]
    assert "idle" not in groups[0][0].counts


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_a_tenth_of_the_rows_may_be_dropped(bad: int, stops: bool) -> None:
    x = torch.randn(10, 3, generator=DRAW)
    x[:bad, 1] = math.inf
    stat = shown(x)
    assert int(stat.sums["dropped"]) == bad
    if not stops:
        stat.check_rows("layer")
        return
    with pytest.raises(Unsound, match=r"not finite\nlayer: 2 of 10 rows"):
        stat.check_rows("layer")


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_hidden_states_that_are_not_finite_stop_the_walk(bad: int, stops: bool) -> None:
    call = Call((torch.empty(0),), {}, ("hidden_states",))
    stream = Stream(torch.ones(2, 5, 3), [{2: call}], 2, torch.device("cpu"))

    class Overflow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[0, :bad] = math.nan
            return x

    if not stops:
        stream.advance(0, Overflow())
        return
    with pytest.raises(Unsound, match=r"behind block 0\n2 of 10 tokens"):
        stream.advance(0, Overflow())
