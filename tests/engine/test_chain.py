"""Tuning the whole model: gradients equal autograd's; finished blocks come back as they went."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.plan import Plan
from aptq.engine.chain import Chain
from aptq.engine.compressed import Compressed
from aptq.engine.stage import methods
from aptq.engine.stream import open_stream
from aptq.engine.walk import walk
from aptq.model.model import Model
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model

ARCHS = ("llama", "gemma3", "gpt2", "qwen3_moe")


def finished(
    folder: Path,
    scratch: Path,
    stages: list[str],
    grid: str = "int3-g16-z",
    *,
    device: torch.device = CPU,
    written: int = 0,
) -> Compressed:
    """A tiny model after the walk."""
    from aptq.core.grid import Grid

    model, ids = Model.open(folder), windows(4, 12)
    plan = Plan.uniform(model.shapes, Grid.parse(grid))
    held = Compressed(model, plan, ids, written, device, scratch, "memory")
    stream = open_stream(model, ids, device=device, folder=scratch, where="memory")
    walk(model, stream, [methods.get(name)() for name in stages], plan, sink=held.keep)
    return held


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("parked", [False, True])
def test_gradients_equal_autograd(name: str, parked: bool, tmp_path: Path) -> None:
    held = finished(tiny_model(name, tmp_path / "m", torch.float32), tmp_path, ["rtn"])
    model, stage = held.model, methods.get("e2e_qp")(zeros=1e-3, weights=1e-3)
    stream, wanted = held.stream(), held.original()
    knobs = [stage.open(held.open(index, stream)) for index in range(model.blocks)]
    stream.learn(model, [2])
    chain = Chain(held, knobs, stream, wanted)
    chain.parked = parked
    picked = torch.tensor([0, 3])
    loss = chain.gradients(picked)
    ours = [p.grad.clone() for own in knobs for p in own.parameters() if p.grad is not None]

    for own in knobs:
        own.zero_grad(set_to_none=True)
    whole = direct(chain, picked)
    whole.backward()
    theirs = [p.grad for own in knobs for p in own.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-5, atol=1e-7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    chain.close()


def direct(chain: Chain, picked: Tensor) -> Tensor:
    """The loss in one graph."""
    from aptq.engine.tail import logits

    x = chain.stream.hidden[picked]
    for own in chain.knobs:
        x = chain._run(own, x)
    ids = chain.compressed.ids[picked]
    ours = logits(chain.model, x, ids).log_softmax(-1)
    with torch.no_grad():
        theirs = logits(chain.model, chain.wanted.hidden[picked], ids).log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) / ids.numel()


@pytest.mark.parametrize("name", ARCHS)
def test_finished_blocks_come_back(name: str, tmp_path: Path) -> None:
    held = finished(tiny_model(name, tmp_path / "m", torch.bfloat16), tmp_path, ["gptq"])
    stream = held.stream()
    for index in range(held.model.blocks):
        block = held.open(index, stream)
        before = {key: value.clone() for key, value in block.stored().items()}
        held.keep(block)
        held.model.unload(index)
        after = held.open(index, stream).stored()
        held.model.unload(index)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_it_learns_and_never_ends_worse(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", torch.bfloat16)
    held = finished(folder, tmp_path, ["rtn"], "int2-g16-z")
    methods.get("e2e_qp")(steps=30, batch=1, scales=0.02, checks=3).on_model(held)
    (record,) = held.blocks[held.model.blocks - 1].records
    assert record["end"] <= record["start"]
    assert record["last"] < record["first"]


def test_written_windows_are_trained_on_and_text_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = finished(tiny_model("llama", tmp_path / "m", torch.bfloat16), tmp_path, ["rtn"])
    held.ids = torch.cat([held.ids, windows(4, 12, seed=5)])
    held.written = 4
    seen: dict[str, set[int]] = {"gradients": set(), "measure": set()}
    for name, numbers in seen.items():
        inner = getattr(Chain, name)

        def spy(self: Chain, picked: Tensor, *more: int, inner=inner, into=numbers) -> object:  # type: ignore[no-untyped-def]
            into.update(picked.tolist())
            return inner(self, picked, *more)

        monkeypatch.setattr(Chain, name, spy)
    methods.get("e2e_qp")(steps=12, batch=1, held=0.5).on_model(held)
    assert len(seen["measure"]) == 2
    assert max(seen["measure"]) < 4
    assert seen["gradients"] == set(range(8)) - seen["measure"]


def test_no_steps_change_nothing(tmp_path: Path) -> None:
    held = finished(tiny_model("llama", tmp_path / "m", torch.bfloat16), tmp_path, ["gptq"])
    codes = [x.parts[0].tensors() for x in layers(held)]
    methods.get("e2e_qp")(epochs=0.0).on_model(held)
    for before, layer in zip(codes, layers(held), strict=True):
        for key, value in layer.parts[0].tensors().items():
            assert torch.equal(before[key], value), key


def layers(held: Compressed) -> list:  # type: ignore[type-arg]
    """Every layer of every block."""
    stream, found = held.stream(), []
    for index in range(held.model.blocks):
        found += held.open(index, stream).layers.values()
        held.model.unload(index)
    return found


def test_a_stage_for_the_whole_model_comes_last() -> None:
    from aptq.recipe import Recipe

    late = (methods.get("e2e_qp")(), methods.get("gptq")())
    with pytest.raises(ValueError, match="put it last"):
        Recipe(stages=late)
