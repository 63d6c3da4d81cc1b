"""What a forward walk shows: windows' halves, weights by profile, statistics of one layer alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.core.profile import Profiles, row_weights
from aptq.engine import stream as stream_module
from aptq.engine.backward import Observed, backward_walk
from aptq.engine.block import Block
from aptq.engine.stat import Seen, Stat
from aptq.engine.stream import open_stream
from aptq.engine.tape import open_tape
from aptq.model.model import Model
from aptq.stats.gradient import Gradient
from aptq.stats.hessian import Hessian
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model

LENGTH, COUNT = 45, 100  # two batches, the first of 91 windows: the second begins with an odd one


@dataclass(frozen=True, kw_only=True)
class Spy(Stat):
    """Keeps what it was shown; `own` as asked."""

    own: bool = True  # type: ignore[mutable-override,misc]
    size: int = 1
    weighted = True  # type: ignore[assignment]
    seen: list[Seen] = field(default_factory=list, compare=False)

    def start(self, columns: int, device: torch.device) -> Self:
        return type(self)(own=self.own, size=self.size)

    def update(self, seen: Seen) -> None:
        self.seen.append(seen)

    def merge(self, other: Self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def forget(self) -> None: ...

    def nbytes(self, columns: int) -> int:
        return self.size


@dataclass(frozen=True, kw_only=True)
class Watcher(Spy):
    """Asks what its unit puts out, while it can."""

    watches = True  # type: ignore[assignment]
    answers: list[tuple[str, Tensor, Tensor | None]] = field(default_factory=list, compare=False)

    def update(self, seen: Seen) -> None:
        trace = seen.attention
        assert trace is not None
        self.answers.append((trace.role, trace.y.clone(), trace.unit.weight))


def opened(name: str, folder: Path, profiles: Profiles | None, ids: Tensor) -> Block:
    model = Model.open(tiny_model(name, folder / "model", torch.float32))
    plan = Plan.uniform(model.shapes, Grid.parse("int4-g16-z"), ["*.v_proj"])
    stream = open_stream(model, ids, device=CPU, folder=folder)
    module, groups = model.load(0), model.groups(0)
    return Block(0, model.block_name(0), module, groups, plan, stream, "block", profiles)


def seen_by(block: Block, path: str, need: Spy) -> Sequence[Seen]:
    stat = block.layers[f"{block.name}.{path}"].stats[need]
    assert isinstance(stat, Spy)
    return stat.seen


def test_own_statistics_see_the_weights_of_their_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    profile = {path: torch.rand(6) for path in ("q_proj", "k_proj")}
    names = {f"model.layers.0.self_attn.{path}": value for path, value in profile.items()}
    block = opened("llama", tmp_path, Profiles(20, names), windows(COUNT, LENGTH))
    own, shared = Spy(own=True), Spy(own=False)
    block.collect([own, shared], block.groups[0])
    for path, value in profile.items():
        seen = seen_by(block, f"self_attn.{path}", own)
        weight = torch.cat([one.weight for one in seen if one.weight is not None])
        assert torch.equal(weight, row_weights(value, 20, LENGTH).repeat(COUNT))
    half = torch.cat([one.half for one in seen if one.half is not None])
    assert len(seen) > 1
    assert torch.equal(half, torch.arange(COUNT * LENGTH) // LENGTH % 2)
    q, k = (block.layers[f"model.layers.0.self_attn.{path}"] for path in profile)
    assert q.stats[shared] is k.stats[shared]
    assert q.stats[own] is not k.stats[own]
    mean = torch.stack([row_weights(value, 20, LENGTH) for value in profile.values()]).mean(0)
    for one in seen_by(block, "self_attn.q_proj", shared):  # what layers share has their mean
        assert one.weight is not None
        torch.testing.assert_close(one.weight, mean.repeat(len(one.x) // LENGTH))


def test_layers_without_profile_are_weighted_alike_and_counted(tmp_path: Path) -> None:
    names = {"model.layers.0.self_attn.q_proj": torch.rand(6) + 1}
    block = opened("llama", tmp_path, Profiles(LENGTH, names), windows())
    weighted = Hessian(rows="gradient", share=False)
    block.collect([weighted, Hessian()], block.groups[0])
    q, k = (block.layers[f"model.layers.0.self_attn.{path}"] for path in ("q_proj", "k_proj"))
    assert (q.counts, k.counts) == ({}, {"unweighted": 1.0})
    moments = [layer.stats[need] for layer in (q, k) for need in (weighted, Hessian())]
    of_q, uniform, of_k, _ = (stat.matrix() for stat in moments if isinstance(stat, Hessian))
    torch.testing.assert_close(of_k, uniform)
    assert not torch.allclose(of_q, uniform, rtol=1e-3)


def test_without_profiles_gradient_rows_are_refused(tmp_path: Path) -> None:
    block = opened("llama", tmp_path, None, windows())
    with pytest.raises(ValueError, match="measure profiles first"):
        block.collect([Hessian(rows="gradient", share=False)], block.groups[0])


def test_rows_of_experts_are_weighted_by_their_tokens(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.1.gate_proj"
    profile = torch.tensor([5.0, 4, 3, 2, 1])
    block = opened("mixtral", tmp_path, Profiles(12, {name: profile}), windows(5, 12))
    group = next(group for group in block.groups if name in group.layers.values())
    block.collect([Spy()], group)
    (seen,) = seen_by(block, "mlp.experts.1.gate_proj", Spy())
    assert seen.position is not None
    assert seen.weight is not None
    assert torch.equal(seen.weight, row_weights(profile, 12, 12)[seen.position])


@pytest.mark.parametrize("walk", ["forward", "backward"])
def test_attention_is_there_for_those_who_watch(walk: str, tmp_path: Path) -> None:
    """Also the weights of its output, although o_proj itself is kept."""
    model = Model.open(tiny_model("llama", tmp_path / "model", torch.float32))
    plan = Plan.uniform(model.shapes, Grid.parse("int4-g16-z"), ["*.o_proj"])
    ids, name = windows(), "model.layers.0.self_attn"
    profile = torch.tensor([5.0, 4, 3, 2, 1])
    outputs: list[Tensor] = []

    def work(block: Block) -> None:
        out = block.linears[f"{name}.o_proj"]
        out.register_forward_hook(lambda m, a, y: outputs.append(y.detach().flatten(0, 1)))
        if isinstance(block, Observed):
            layer = block.layers[f"{name}.o_proj"]
            layer.profile, layer.window = profile, 12
            block.observe({f"{name}.{path}_proj": [Watcher()] for path in "qkv"})
        else:
            block.collect([Watcher()], block.groups[0])
        for path in "qkv":
            stat = block.layers[f"{name}.{path}_proj"].stats[Watcher()]
            assert isinstance(stat, Watcher)
            ((role, y, weight),) = stat.answers
            assert role == path
            torch.testing.assert_close(y, outputs[0], rtol=1e-5, atol=1e-6)
            assert weight is not None
            assert torch.equal(weight, row_weights(profile, 12, 12))

    if walk == "backward":
        tape = open_tape(model, ids, device=CPU, folder=tmp_path)
        backward_walk(model, tape, ids, lambda block: work(block) if block.index == 0 else None)
    else:
        stream = open_stream(model, ids, device=CPU, folder=tmp_path)
        profiles = Profiles(12, {f"{name}.o_proj": profile})
        module, groups = model.load(0), model.groups(0)
        work(Block(0, "model.layers.0", module, groups, plan, stream, "block", profiles))


def test_gradients_are_not_asked_of_a_forward_walk(tmp_path: Path) -> None:
    block = opened("llama", tmp_path, None, windows())
    with pytest.raises(AssertionError, match="no gradients"):
        block.collect([Gradient()], block.groups[0])


def test_memory_of_own_statistics_counts_once_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q and k (v is kept), o, gate and up, down: 2 + 1 + 2 + 1 sums of 1, at most 3 at a time."""
    block = opened("llama", tmp_path, None, windows())
    monkeypatch.setattr(stream_module, "free_bytes", lambda device: 6)
    slices = block._slices(block.groups, [Spy()])
    assert [len(groups) for groups in slices] == [2, 2]
    slices = block._slices(block.groups, [Spy(own=False)])
    assert [len(groups) for groups in slices] == [3, 1]
