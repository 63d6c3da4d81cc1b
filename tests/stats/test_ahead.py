"""Factors made ahead are those that groups would make for themselves, and go with their group."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.plan import Plan, Target
from aptq.engine.block import Block, Order
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.engine.stat import Seen
from aptq.model.model import Model
from aptq.stats import ahead, hessian
from aptq.stats.ahead import AHEAD_BYTES, ahead_count, factor_ahead
from aptq.stats.hessian import Hessian
from tests.engine.run import Walked, walked, windows
from tests.tiny import TINY, _config, tiny_model

CPU, NEED = torch.device("cpu"), Hessian()


def expert(number: int, *, columns: int = 20, rows: int = 60, grid: str = "int4-g5-z") -> Layer:
    generator = torch.Generator().manual_seed(number)
    stat = NEED.start(columns, CPU)
    if rows:
        stat.update(Seen(torch.randn(rows, columns, generator=generator), None, 4))
    weight = torch.randn(8, columns, generator=generator)
    return Layer(f"experts.{number}", "up", weight, None, Target.parse(grid), {NEED: stat})


def stat_of(layer: Layer) -> Hessian:
    stat = layer.stats[NEED]
    assert isinstance(stat, Hessian)
    return stat


def forced(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(ahead, "ahead_count", lambda _size, _device: room)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is factored by itself."""
    made, plain = list[int](), hessian.damped_factor

    def counted(H: torch.Tensor, *rest: object, **more: object) -> object:
        made.append(len(H))
        return plain(H, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(hessian, "damped_factor", counted)
    return made


def test_only_a_gpu_and_small_matrices_and_little_memory() -> None:
    gpu = torch.device("cuda")
    assert ahead_count(64, CPU) == 0
    assert ahead_count(2049, gpu) == 1
    for size in (768, 1408, 2048):
        found = ahead_count(size, gpu)
        assert 8 * size**2 * found <= AHEAD_BYTES < 8 * size**2 * (found + 1)


@pytest.mark.parametrize("columns", ["natural", "activation", "grouped"])
def test_groups_find_what_they_would_make(
    columns: str, alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one, one with NaN, one with a dead column and one of another width among them."""
    layers = [expert(number) for number in range(6)]
    layers[1] = expert(1, rows=0)
    stat_of(layers[2]).sums["h"][0, 3] = torch.nan
    stat_of(layers[3]).sums["h"][4] = stat_of(layers[3]).sums["h"][:, 4] = 0
    layers[4] = expert(4, columns=30)
    forced(monkeypatch, 5)
    factor_ahead([[layer] for layer in layers], NEED, 0.01, columns)
    assert not stat_of(layers[4]).cache
    stage = methods.get("gptq")(columns=columns)
    same = [replace(layer, stats={}, parts=[], counts={}) for layer in layers]
    for layer, other in zip(layers, same, strict=True):
        fresh = replace(stat_of(layer), cache={})
        other.stats[NEED] = fresh
        grid = Grid.parse("int4-g5-z")
        before = len(alone)
        one = stage.prepare(layer, grid)
        assert len(alone) - before == (layer is layers[4])
        two = stage.prepare(other, grid)
        assert (one is None) == (two is None) == (layer in (layers[1], layers[2]))
        assert layer.counts == other.counts
        assert layer.damping == other.damping
        if one is not None and two is not None:
            assert torch.equal(one.order, two.order)
            torch.testing.assert_close(one.U, two.U, rtol=1e-3, atol=1e-4)


def test_no_more_than_there_is_room_for_and_nothing_for_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(layers: Sequence[Layer]) -> list[bool]:
        return [bool(stat_of(layer).cache) for layer in layers]

    layers = [expert(number) for number in range(9)]
    groups = [[layer] for layer in layers]
    factor_ahead(groups, NEED, 0.01, "natural")  # on a CPU
    assert not any(made(layers))
    forced(monkeypatch, 4)
    factor_ahead(groups, NEED, 0.01, "natural")
    assert made(layers) == [True] * 4 + [False] * 5
    factor_ahead(groups, NEED, 0.01, "natural")  # the first has been made
    assert made(layers) == [True] * 4 + [False] * 5
    factor_ahead(groups[6:], NEED, 0.01, "natural")  # three are left
    assert made(layers) == [True] * 4 + [False] * 5
    forced(monkeypatch, 3)
    factor_ahead(groups[4:], NEED, 0.01, "natural")
    assert made(layers) == [True] * 4 + [False] * 5
    forced(monkeypatch, 8)
    shared = [replace(layers[4], name="gate"), layers[4]]
    unseen = replace(layers[5], stats={})
    rest = [shared, [unseen], *groups[5:], []]
    factor_ahead(rest, NEED, 0.01, "natural")
    assert made(layers) == [True] * 9


STAGES = [
    ("gptq", {}, "int3-g8-z"),
    ("gptq", {"clip": 0.5, "columns": "grouped", "groups": "dynamic"}, "int3-g8-z"),
    ("slim", {}, "int3-g8-z~"),
    ("lqlora", {}, "int3-g8-z+r4"),
    ("spqr", {}, "int3-g8-z+o2%"),
]


@pytest.mark.parametrize("order", ["block", "group"])
@pytest.mark.parametrize(("name", "options", "target"), STAGES, ids=str)
def test_a_walk_does_not_depend_on_it(
    name: str,
    options: dict[str, object],
    target: str,
    order: Order,
    alone: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight experts, five at a time; of one the plan keeps a layer and leaves others in 16 bits."""
    many = _config("mixtral", num_local_experts=8, num_experts_per_tok=2)
    monkeypatch.setitem(TINY, "mixtral", lambda: many)
    model = Model.open(tiny_model("mixtral", tmp_path / "moe", torch.float32))
    targets = dict.fromkeys(model.shapes, Target.parse(target))
    for path in model.shapes:
        if ".0.mlp.experts.1." in path:
            targets[path] = Target.parse("keep" if "down" in path else "bf16")
    stages: list[Stage] = [methods.get(name)(**options)]
    stages += [methods.get("gptq")()] * (name == "spqr")
    commit, left = Block.commit, list[int]()

    def committed(self: Block, group: object) -> None:
        commit(self, group)  # type: ignore[arg-type]
        done = [x for x in self.layers.values() if x.coded or x.parts]
        left.append(sum(bool(stat.cache) for x in done for stat in x.stats.values()))  # type: ignore[attr-defined]

    monkeypatch.setattr(Block, "commit", committed)
    found: list[tuple[Walked, int]] = []
    for room in (0, 5):
        forced(monkeypatch, room)
        alone.clear()
        ids = windows(8, 24)
        made = walked(model, stages, Plan(targets), tmp_path, order=order, ids=ids)
        found.append((made, len(alone)))
    # five of both kinds in each of two blocks, by every stage
    assert found[0][1] - found[1][1] == 20 * len(stages)
    assert left
    if len(stages) == 1:
        assert not any(left)
    same = total = 0
    for path, layer in found[0][0].layers.items():
        other = found[1][0].layers[path]
        assert layer.counts == other.counts
        assert layer.damping == other.damping
        one, two = layer.dense(), other.dense()
        if "lowrank" not in [part.kind for part in layer.target.parts]:
            same, total = same + int(one.eq(two).sum()), total + one.numel()
        assert (one - two).norm() < 0.02 * one.norm()
    assert same >= 0.999 * total
