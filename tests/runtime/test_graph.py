"""Decoding with a fixed cache: the tokens of the growing cache, on a GPU through one graph."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from aptq.runtime.generate import Growing, stream
from aptq.runtime.graph import Static, applies, holds
from aptq.runtime.load import load
from tests.runtime.fused import MIXED, fused_model
from tests.store.packed import pack
from tests.tiny import tiny_model, tiny_tokens


def opened(name: str, folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model(name, folder)).eval()


@torch.inference_mode()
def tokens(forward: Static | Growing, ids: torch.Tensor, count: int) -> torch.Tensor:
    found, step = [], ids
    for _ in range(count):
        step = forward(step).argmax(-1)[:, None]
        found.append(step)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_fixed_cache_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    model, ids = opened(name, tmp_path), tiny_tokens(3, 9)
    assert holds(model)
    assert not applies(model, 3, 40)  # no GPU
    wanted = tokens(Growing(model), ids, 12)
    assert torch.equal(tokens(Static(model, 3, 21), ids, 12), wanted)
    assert torch.equal(torch.stack(list(stream(model, ids, 12)), 1), wanted)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_inference_mode_changes_nothing(name: str, tmp_path: Path) -> None:
    model, ids = opened(name, tmp_path), tiny_tokens(3, 9)
    wanted = tokens(Static(model, 3, 21), ids, 12)
    with torch.inference_mode():
        inside, given = Static(model, 3, 21), ids.clone()
        assert torch.equal(tokens(inside, given, 12), wanted)
    with torch.no_grad():
        assert torch.equal(tokens(Static(model, 3, 21), given, 12), wanted)


def test_logits_do_not_see_free_places(tmp_path: Path) -> None:
    model, ids = opened("llama", tmp_path), tiny_tokens(2, 5)
    forward, longer = Static(model, 2, 8), Static(model, 2, 64)
    with torch.inference_mode():
        whole = model(torch.cat([ids, ids[:, :3]], 1)).logits
        for other in (forward, longer):
            other(ids)
            for at in range(3):
                logits = other(ids[:, at : at + 1])
                torch.testing.assert_close(logits, whole[:, 5 + at], atol=1e-5, rtol=1e-4)
        with pytest.raises(AssertionError, match="room for 8"):
            forward(ids[:, :1])


def test_models_that_route_on_the_host_are_left_out(tmp_path: Path) -> None:
    folder = pack(tiny_model("qwen3_moe", tmp_path), tmp_path / "out", "mixed").folder
    assert not holds(load(folder))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4])
def test_graphs_of_the_gpu_kernels(batch: int) -> None:
    pytest.importorskip("triton")
    model, ids = fused_model(MIXED, "cuda"), tiny_tokens(batch, 9).cuda()
    assert applies(model, batch, 24)
    eager, graphed = Static(model, batch, 33), Static(model, batch, 33)
    eager.captures = False
    wanted = tokens(eager, ids, 24)
    assert wanted.unique().numel() > 3
    assert torch.equal(tokens(graphed, ids, 24), wanted)
    assert graphed.graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_gives_the_tokens_of_the_eager_steps(
    batch: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = pack(tiny_model("llama", tmp_path), tmp_path / "out", "mixed").folder
    model, ids = load(folder, device="cuda", dtype=dtype), tiny_tokens(batch, 9).cuda()
    assert applies(model, batch, 24)
    eager, graphed = Static(model, batch, 33), Static(model, batch, 33)
    eager.captures = False
    wanted = tokens(eager, ids, 24)
    assert torch.equal(tokens(graphed, ids, 24), wanted)
    assert graphed.graph is not None
    if dtype == torch.float32:
        assert torch.equal(tokens(Growing(model), ids, 24), wanted)


@pytest.mark.gpu
def test_generation_takes_graphs_and_draws_alike(tmp_path: Path) -> None:
    model, ids = opened("llama", tmp_path).cuda(), tiny_tokens(2, 9)

    def drawn(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.stack(list(stream(model, ids, count, temperature=1.0, generator=generator)), 1)

    assert torch.equal(drawn(16)[:, :7], drawn(7))  # seven are too few for a graph


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_as_it_is(tmp_path: Path) -> None:
    model, ids = opened("llama", tmp_path).cuda(), tiny_tokens(1, 9).cuda()
    wanted = tokens(Growing(model), ids, 12)
    model.model.norm.register_forward_hook(lambda _module, _args, out: out * bool(out.any().item()))
    forward = Static(model, 1, 21)
    assert torch.equal(tokens(forward, ids, 12), wanted)
    assert forward.graph is None
