"""Steps that torch compiles: the same tokens from one graph, or one clear error."""

import copy
import functools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aptq.runtime.generate import stream
from aptq.runtime.graph import Static, hindrance
from tests.kernels.plain import calls
from tests.runtime.fused import COUPLED, MIXED, fused_model, same_steps
from tests.runtime.test_graph import opened, tokens
from tests.tiny import tiny_tokens

__all__ = ["calls"]


def backend(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    chosen = functools.partial(torch.compile, backend=name, fullgraph=True)
    monkeypatch.setattr(torch, "compile", chosen)


@pytest.mark.parametrize(("grids", "products"), [(COUPLED, 8), (MIXED, 12)])
def test_stacked_steps_are_one_graph(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, grids: dict[str, str], products: int
) -> None:
    model, ids = fused_model(grids, attention_bias=True), tiny_tokens(2, 9)
    exact = tokens(Static(model, 2, 22, apart=True), ids, 12)
    backend(monkeypatch, "aot_eager")
    for _ in range(2):
        forward = Static(model, 2, 22, compiled=True)
        assert torch.equal(tokens(forward, ids, 12), exact)
        calls.clear()
        forward(ids[:, :1])
        assert len(calls) == products
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler")
def test_compiled_steps_give_the_same_tokens(tmp_path: Path) -> None:
    model, ids = opened("llama", tmp_path), tiny_tokens(2, 9)
    exact = tokens(Static(model, 2, 21), ids, 12)
    torch._dynamo.reset()
    assert torch.equal(tokens(Static(model, 2, 21, compiled=True), ids, 12), exact)


def test_what_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    model, ids = opened("llama", tmp_path), tiny_tokens(1, 9)
    backend(monkeypatch, broken)
    forward = Static(model, 1, 21, compiled=True)
    forward(ids)
    with pytest.raises(ValueError, match=r"(?s)cannot compile.*Failed to find C compiler.*leave"):
        forward(ids[:, :1])
    with pytest.raises(ValueError, match=r"steps cannot be compiled\nthe model is on cpu"):
        next(stream(model, ids, 12, compiled=True))
    assert next(stream(model, ids, 12)).shape == (1,)


def test_reasons(tmp_path: Path) -> None:
    model, cuda = opened("llama", tmp_path), torch.device("cuda", 0)

    def reason(batch: int, count: int, **changes: object) -> str | None:
        on = [SimpleNamespace(device=cuda)]
        known = {"device": cuda, "parameters": lambda: on, "modules": model.modules}
        known |= {"config": model.config, "_can_compile_fullgraph": True} | changes
        return hindrance(SimpleNamespace(**known), batch, count)  # type: ignore[arg-type]

    assert reason(64, 8) is None
    assert reason(65, 8) == "65 windows at once, 64 at most"
    assert reason(1, 7) == "7 tokens to write, 8 at least"
    assert reason(1, 8, _can_compile_fullgraph=False) == (
        "llama has caches, masks or experts that no graph holds"
    )
    other = [SimpleNamespace(device=torch.device("cuda", 1)), SimpleNamespace(device=cuda)]
    assert reason(1, 8, parameters=lambda: other) == "the model lies on several devices"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("grids", [COUPLED, MIXED])
def test_compiled_steps_on_a_gpu(grids: dict[str, str]) -> None:
    pytest.importorskip("triton")
    model, ids = fused_model(grids, "cuda", attention_bias=True), tiny_tokens(1, 9).cuda()
    apart = Static(copy.deepcopy(model), 1, 40, apart=True)
    forward = Static(model, 1, 40, compiled=True)
    same_steps(apart, forward, ids)
    assert forward.graph is not None
