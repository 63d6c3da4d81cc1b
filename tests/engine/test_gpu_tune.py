"""Recorded steps on a GPU do what single launches do."""

from pathlib import Path

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.engine.block import Block
from aptq.engine.capture import steady
from aptq.engine.chain import Chain
from aptq.engine.origin import Origin
from aptq.engine.stage import methods
from aptq.engine.stream import open_stream
from aptq.engine.window import Window
from aptq.model.model import Model
from tests.engine.run import windows
from tests.engine.test_chain import finished
from tests.tiny import tiny_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def window(name: str, stage: str, folder: Path) -> Window:
    """Block 0 of a tiny model on the GPU, with the knobs of a stage."""
    model = Model.open(tiny_model(name, folder / "model", torch.float32))
    plan, method = Plan.uniform(model.shapes, Grid.parse("int2-g16-z")), methods.get(stage)()
    stream = open_stream(model, windows(8, 12), device=CUDA, folder=folder, where="memory")
    stream.learn(model, [2, 4])
    module = model.load(0, CUDA)
    origin = Origin(0, model.block_name(0), module, stream.twin())
    block = Block(
        0, model.block_name(0), module, model.groups(0), plan, stream, "block", None, origin
    )
    knobs = method.open(block, torch.Generator().manual_seed(0))
    options = {"target": "original", "loss": "mse", "size": 4, "weighted": False}
    return Window([block], [knobs], **options)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("stage", ["efficientqat", "autoround"])
def test_recorded_gradients(name: str, stage: str, pieces: int, tmp_path: Path) -> None:
    found = window(name, stage, tmp_path)
    assert steady(found.knobs, [found.stream.hidden, *found.wanted])
    parameters = list(found.knobs[0].parameters())
    for step, picked in enumerate(([0, 3, 5, 6], [7, 1, 2, 4], [0, 1, 2, 3])):
        ids = torch.tensor(picked)
        for parameter in parameters:
            parameter.grad = None
        loss = found.gradients(ids, pieces)
        ours = [p.grad.clone() if p.grad is not None else None for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        wanted = found._gradients(ids.cuda(), pieces)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-8)
        for one, parameter in zip(ours, parameters, strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-8)
        with torch.no_grad():  # values move, memory stays
            for parameter in parameters:
                parameter.mul_(1.0 + 0.001 * (step + 1))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_recorded_gradients_of_the_whole_model(name: str, tmp_path: Path) -> None:
    folder = tiny_model(name, tmp_path / "m", torch.float32)
    held = finished(folder, tmp_path, ["rtn"], device=CUDA)
    stage = methods.get("e2e_qp")(zeros=1e-3, weights=1e-3)
    stream, wanted = held.stream(), held.original()
    knobs = [stage.open(held.open(index, stream)) for index in range(held.model.blocks)]
    stream.learn(held.model, [2])
    chain = Chain(held, knobs, stream, wanted)
    parameters = [p for own in knobs for p in own.parameters()]
    for step, picked in enumerate(([0, 3], [2, 1], [1, 3])):
        ids = torch.tensor(picked)
        for parameter in parameters:
            parameter.grad = None
        loss = chain.gradients(ids)
        assert chain.captured is not None
        ours = [None if p.grad is None else p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        states = chain._forward(ids)
        wanted_loss, grad = chain._tail(states[-1], ids)
        chain._backward(states, grad)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-8)
        for one, parameter in zip(ours, parameters, strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-8)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.0 + 0.001 * (step + 1))
    chain.close()


def test_routed_blocks_are_not_recorded(tmp_path: Path) -> None:
    found = window("qwen3_moe", "efficientqat", tmp_path)
    assert not steady(found.knobs, [found.stream.hidden, *found.wanted])
