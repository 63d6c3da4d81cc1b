"""Sums of parts under training: the right weights, gradients and parts; other parts stay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aptq.core.parts import LowRank, Part, Sparse
from aptq.core.plan import Plan, Target
from aptq.engine.block import Block
from aptq.engine.compressed import Compressed
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage, methods
from aptq.engine.stat import Seen
from aptq.engine.stream import open_stream
from aptq.engine.summed import Summed, summed
from aptq.engine.walk import walk
from aptq.model.model import Model
from aptq.stats.correct import Correct
from aptq.stats.hessian import Hessian
from tests.core.test_sums import SHAPE, made, normal
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model


def layer(text: str) -> Layer:
    """A layer that svd has finished, with single weights beside where the text has some."""
    one = Layer("layer", "q", normal(*SHAPE), None, Target.parse(text))
    stage = methods.get("svd")()
    assert isinstance(stage, Correct)
    stage.on_layer(one)
    if one.target.part("sparse") is not None:
        one.parts.insert(1, made("o7%")[0])
    return one


@pytest.mark.parametrize("text", ["int3-g7-z+r3", "int3-g7-z+o7%+r3", "int3-g7-z+r3@int8-row"])
@pytest.mark.parametrize("codes", [False, True])
def test_the_sum_and_its_gradients(text: str, codes: bool) -> None:
    one = layer(text)
    stage = methods.get("e2e_qp")()
    knob = summed(one, stage.knob if codes else None, 1e-2)  # type: ignore[attr-defined]
    assert isinstance(knob, Summed)
    torch.testing.assert_close(knob.weight(), one.dense())
    target = normal(*SHAPE)
    ((knob.weight() - target) ** 2).sum().backward()
    assert knob.left is not None
    part = next(part for part in one.parts if isinstance(part, LowRank))
    left, right = (x.requires_grad_() for x in part.factors())
    rest = one.dense() - part.dense()
    ((rest + left.T @ right - target) ** 2).sum().backward()
    assert left.grad is not None
    assert right.grad is not None
    torch.testing.assert_close(knob.left.grad, left.grad * knob.sizes[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(knob.right.grad, right.grad * knob.sizes[1], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(knob.parts(), one.parts, strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=1e-2, atol=1e-2)
    assert len(knob.groups()) == (2 if codes else 1)


def test_nothing_to_move() -> None:
    assert summed(layer("int3-g7-z"), None, 1e-2) is None
    assert summed(layer("int3-g7-z+r3"), None, 0.0) is None


PLAN = "int2-g16-z+r2"


def held(
    stages: list[tuple[str, dict[str, Any]]], folder: Path, text: str = PLAN
) -> tuple[Compressed, Any]:
    model = Model.open(tiny_model("llama", folder / "model", torch.bfloat16))
    ids, plan = windows(6, 12), Plan(dict.fromkeys(model.shapes, Target.parse(text)))
    found = [methods.get(name)(**options) for name, options in stages]
    compressed = Compressed(model, plan, ids, 0, CPU, folder, "memory")
    stream = open_stream(model, ids, device=CPU, folder=folder, where="memory")
    walk(model, stream, found, plan, sink=compressed.keep)
    return compressed, stream


def parts_of(compressed: Compressed, stream: Any) -> dict[str, list[Part]]:
    found = {}
    for index in range(compressed.model.blocks):
        block = compressed.open(index, stream)
        found |= {name: list(layer.parts) for name, layer in block.layers.items()}
        compressed.model.unload(index)
    return found


@pytest.mark.parametrize("first", ["eora", "nothing"])
def test_lrec_moves_factors_alone(first: str, tmp_path: Path) -> None:
    names: list[tuple[str, dict[str, Any]]] = [("rtn", {})]
    names += [("eora", {})] if first == "eora" else []
    names += [("lrec", {"steps": 12, "batch": 2, "checks": 2})]
    compressed, stream = held(names, tmp_path)
    before = parts_of(compressed, stream)
    methods.get("lrec")(**names[-1][1]).on_model(compressed)
    after = parts_of(compressed, stream)
    moved = 0
    for name, parts in after.items():
        assert torch.equal(parts[0].dense(), before[name][0].dense())
        moved += not torch.equal(parts[1].dense(), before[name][1].dense())
    block = compressed.open(compressed.model.blocks - 1, stream)
    (record,) = [found for found in block.records if found["stage"] == "lrec"]
    assert record["end"] <= record["start"]
    assert bool(moved) == bool(record["kept"])
    assert record["last"] < record["first"]  # it learns the windows that it sees


def test_blocks_are_tuned_around_other_parts(tmp_path: Path) -> None:
    options = {"steps": 6, "batch": 2}
    compressed, stream = held([("rtn", {}), ("eora", {}), ("efficientqat", options)], tmp_path)
    parts = parts_of(compressed, stream)
    assert {tuple(type(part).__name__ for part in some) for some in parts.values()} == {
        ("Quantized", "LowRank")
    }


def test_blocks_are_tuned_around_outliers_that_stand_alone(tmp_path: Path) -> None:
    """The stage that tunes them makes the codes too."""
    options = {"steps": 6, "batch": 2}
    stages: list[tuple[str, dict[str, Any]]] = [("spqr", {}), ("autoround", options)]
    parts = parts_of(*held(stages, tmp_path, "int2-g16-z+o2%"))
    assert {tuple(part.kind for part in some) for some in parts.values()} == {
        ("quantized", "sparse")
    }


class Look(Stage):
    """Whether the block runs with its layers' own weights."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def on_blocks(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self.found += [
                torch.equal(block.linears[name].weight.float(), layer.weight)
                for name, layer in block.layers.items()
            ]


def test_a_block_keeps_its_weights_until_there_are_codes(tmp_path: Path) -> None:
    model = Model.open(tiny_model("llama", tmp_path / "model", torch.bfloat16))
    plan = Plan(dict.fromkeys(model.shapes, Target.parse("int4-g16+o3%")))
    before, after = Look(), Look()
    stages = [methods.get("spqr")(), before, methods.get("gptq")(), after]
    stream = open_stream(model, windows(6, 12), device=CPU, folder=tmp_path, where="memory")
    walk(model, stream, stages, plan, sink=lambda _block: None)
    assert before.found
    assert all(before.found)
    assert not any(after.found)


def test_what_drift_moves_is_the_whole_weight(tmp_path: Path) -> None:
    """Outliers are part of what runs: the optimum that the codes go for counts them in."""
    one = layer("int4-g7-z+o7%")
    one.parts = [part for part in one.parts if isinstance(part, Sparse)]
    hessian = Hessian(rows="uniform", drift=True).start(SHAPE[1], CPU)
    x = normal(40, SHAPE[1])
    hessian.update(Seen(x, None, 40, original=x + 0.3 * normal(40, SHAPE[1])))
    stage = methods.get("gptq")(drift=0.5)
    one.stats[stage.needs()[0]] = hessian
    problem = stage.prepare(one, one.target.grid)  # type: ignore[attr-defined]
    wanted = hessian.target(one.weight, 0.5) - one.dense()
    torch.testing.assert_close(problem.W, wanted)
    assert not torch.allclose(wanted, hessian.target(one.residual(), 0.5), rtol=1e-3, atol=1e-3)
