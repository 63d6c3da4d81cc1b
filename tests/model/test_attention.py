"""The attention seam gives what the model's own attention gives, whatever the mask and form."""

import pytest
import torch
from torch import Tensor

from aptq.model.attention import Attention, heard
from aptq.model.dry import Call
from tests.blocks import opened
from tests.tiny import TINY

FAMILIES = [name for name in TINY if name != "gemma3n"]  # which no command opens


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_differentiable_run_gives_the_same_output(name: str, index: int) -> None:
    """Length 12 is more than the sliding window of 8."""
    wide = name not in ("gpt_oss", "qwen3_moe", "mixtral", "qwen3_next")  # experts in float32 only
    dtype = torch.float64 if wide else torch.float32
    block = opened(name, index, dtype=dtype, length=12)
    real: dict[str, Tensor] = {}
    role = next(role for role, path in block.paths.items() if "att" in path and role != "o")
    handle = block.linear("o").register_forward_hook(lambda _m, _x, y: real.update(y=y))
    found: dict[str, Tensor] = {}
    block.traced(role, lambda trace: found.update(y=trace.y), chunk=100)
    handle.remove()
    torch.testing.assert_close(found["y"], real["y"].flatten(0, 1).to(found["y"].dtype))


def attention(**changes: object) -> Attention:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 9, 6, dtype=torch.float64, generator=generator) for heads in (6, 3, 3)
    )
    return Attention(q, k, v, **{"scaling": 0.7, **changes})  # type: ignore[arg-type]


def full(a: Attention) -> Tensor:
    """Probabilities [batch, heads, T, T], in pieces."""
    groups = [torch.cat([a.rows(g, c)[0] for c in a.chunks()], 2) for g in range(a.kv)]
    return torch.cat(groups, 1)


def test_masks() -> None:
    t = torch.arange(9)
    causal = (t <= t[:, None])[None, None]
    near = causal & (t[:, None] - t < 4)
    assert torch.equal(full(attention()) > 0, causal.expand(2, 6, -1, -1))
    assert torch.equal(full(attention(window=4)) > 0, near.expand(2, 6, -1, -1))
    assert (full(attention(causal=False)) > 0).all()
    expected = full(attention(window=4))
    numbers = torch.zeros(near.shape, dtype=torch.float64)
    numbers.masked_fill_(~near, torch.finfo(torch.float64).min)
    torch.testing.assert_close(full(attention(mask=near, causal=False)), expected)
    torch.testing.assert_close(full(attention(mask=numbers)), expected)
    by_head = near.repeat(2, 6, 1, 1)
    by_head[:, 4] = causal
    found = full(attention(mask=by_head))
    torch.testing.assert_close(found[:, 4], full(attention())[:, 4])
    torch.testing.assert_close(found[:, 3], expected[:, 3])


def test_tilt_is_the_slope_of_the_soft_cap() -> None:
    cap = attention(softcap=0.8, sinks=torch.linspace(-1, 1, 6, dtype=torch.float64))
    a, tilt = cap.rows(1, slice(0, 9))
    assert (a.sum(-1) < 1).all()  # the sink takes its share
    q = cap.q.clone().requires_grad_()
    direction = torch.randn(2, 6, 9, 6, dtype=torch.float64)
    moved = Attention(q, cap.k, cap.v, 0.7, softcap=0.8, sinks=cap.sinks)
    (grad,) = torch.autograd.grad((moved.rows(1, slice(0, 9))[0] * 1.0).square().sum(), q)
    ds = 0.7 * direction[:, 2:4] @ cap.k[:, 1, None].mT
    change = tilt * ds - a * (tilt * ds).sum(-1, keepdim=True)
    torch.testing.assert_close((grad * direction).sum(), (2 * a * change).sum())


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_attend_is_exact_and_differentiable_in_any_chunks(chunk: int) -> None:
    whole = attention(softcap=2.0)
    q, k, v = (x.clone().requires_grad_() for x in (whole.q, whole.k, whole.v))
    pieces = Attention(q, k, v, 0.7, softcap=2.0, chunk=chunk)
    expected = full(whole) @ whole.v.repeat_interleave(2, 1)
    y = pieces.attend()
    torch.testing.assert_close(y, expected.transpose(1, 2))
    noise = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, (q, k, v), noise, retain_graph=True)
    again = torch.autograd.grad(y, (q, k, v), noise)
    rows = Attention(q, k, v, 0.7, softcap=2.0)
    plain = full(rows) @ v.repeat_interleave(2, 1)
    known = torch.autograd.grad(plain.transpose(1, 2), (q, k, v), noise)
    torch.testing.assert_close(found, known)
    torch.testing.assert_close(again, known)


def test_no_more_than_a_chunk_of_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    rows = Attention.rows
    monkeypatch.setattr(Attention, "rows", lambda *a: sizes.append(rows(*a)[0].numel()) or rows(*a))
    attention(chunk=100).attend()
    assert len(sizes) == 3 * 5  # two queries of 2 windows, 2 heads and 9 keys at a time
    assert max(sizes) == 72


def test_the_seam_closes_and_refuses_what_it_does_not_know() -> None:
    block = opened("llama")
    config = block.attention.config
    before = config._attn_implementation
    bias = torch.zeros(1, 4, 7, 7, dtype=torch.float64)
    call = Call(block.call.args, {**block.call.kwargs, "position_bias": bias}, block.call.names)
    heard_names = []
    with heard(block.module, lambda *_: heard_names.append(config._attn_implementation), 10):
        block.call.run(block.module)
        with pytest.raises(ValueError, match=r"LlamaAttention calls .* position_bias"):
            call.run(block.module)
    assert heard_names == ["aptq"]
    assert config._attn_implementation == before
    block.call.run(block.module)


@pytest.mark.parametrize(("own", "causal"), [("eager", False), ("sdpa", True)])
def test_no_mask_means_what_it_means_to_the_models_own_code(own: str, causal: bool) -> None:
    block = opened("llama")
    block.attention.config._attn_implementation = own
    with torch.no_grad():
        expected = block.call.run(block.module)
    calls = []
    with heard(block.module, lambda call, _: calls.append(call), 10), torch.no_grad():
        found = block.call.run(block.module)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [call.causal for call in calls] == [causal]
