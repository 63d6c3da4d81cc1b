"""Grouped attention of one token: what transformers computes, or transformers itself."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aptq.runtime import attention
from aptq.runtime.attention import CHANGES, attending, grouped
from aptq.runtime.graph import Static
from tests.runtime.test_graph import opened, tokens
from tests.tiny import tiny_tokens


def module(groups: int) -> nn.Module:
    made = nn.Module()
    made.num_key_value_groups, made.is_causal = groups, True  # type: ignore[assignment]
    return made


def drawn(batch: int, heads: int, kv: int, length: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, length, 8),
        torch.randn(batch, kv, 11, 8),
        torch.randn(batch, kv, 11, 5),
    )


def masks(batch: int) -> list[Tensor | None]:
    hidden = torch.arange(11) > torch.randint(1, 10, (batch, 1))
    return [
        None,
        torch.zeros(batch, 11).masked_fill(hidden, -1e9)[:, None, None],
        ~hidden[:, None, None],
        torch.zeros(1, 11).masked_fill(hidden[:1], -1e9).expand(batch, 1, 1, -1),
    ]


@pytest.mark.parametrize(("heads", "kv"), [(8, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token(batch: int, heads: int, kv: int) -> None:
    q, k, v = drawn(batch, heads, kv)
    for mask in masks(batch):
        given = {"dropout": 0.0, "scaling": 0.3, "position_ids": torch.ones(1, 1)}
        exact, _ = sdpa_attention_forward(module(heads // kv), q, k, v, mask, **given)
        found, weights = grouped(module(heads // kv), q, k, v, mask, **given)
        torch.testing.assert_close(found, exact)
        assert found.shape == (batch, 1, heads, 5)
        assert weights is None


def test_everything_else_goes_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def original(*args: Any, **given: Any) -> tuple[str, None]:
        seen.append(given)
        return "theirs", None

    monkeypatch.setattr(attention, "sdpa_attention_forward", original)

    def goes(length: int = 1, mask: Tensor | None = None, **given: Any) -> bool:
        q, k, v = drawn(2, 8, 2, length)
        return grouped(module(4), q, k, v, mask, **given)[0] == "theirs"  # type: ignore[comparison-overlap]

    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *_, **__: torch.zeros(2, 2, 4, 5)
    )
    assert not goes()
    assert not goes(sliding_window=4, softcap=None, s_aux=None, is_causal=True)
    assert goes(length=2)
    assert goes(dropout=0.1)
    assert goes(softcap=30.0)
    assert goes(s_aux=torch.zeros(8))
    assert goes(position_bias=torch.zeros(1, 8, 1, 11))
    assert goes(mask=torch.zeros(2, 8, 1, 11))
    assert seen[2] == {"softcap": 30.0}


def test_nothing_new_changes_the_numbers() -> None:
    known = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
    taken = set(inspect.signature(sdpa_attention_forward).parameters) - {"kwargs"}
    assert taken <= known | set(CHANGES), "transformers has a new option: is it ignored rightly?"


def test_steps_take_it_and_give_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, lengths = opened("llama", tmp_path), tiny_tokens(2, 9), []

    def counted(*args: Any, **given: Any) -> tuple[Tensor, None]:
        lengths.append(args[1].shape[2])
        assert model.config._attn_implementation == "sdpa"
        return grouped(*args, **given)

    monkeypatch.setattr(attention, "grouped", counted)
    with torch.no_grad():
        exact = model(ids).logits[:, -1]
        forward = Static(model, 2, 12)
        forward(ids[:, :8])
        assert lengths == []
        torch.testing.assert_close(forward(ids[:, 8:]), exact, atol=1e-5, rtol=1e-4)
    assert lengths == [1, 1]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_it_goes_back_on_errors_and_leaves_eager_alone(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    with attending(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is grouped
        assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    with pytest.raises(ZeroDivisionError), attending(model):
        1 / 0  # noqa: B018
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = other = lambda *_: None
        with attending(model), attending(model):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is grouped
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    threads = [attending(model), attending(model)]  # the first to begin is the first to end
    for thread in threads:
        thread.__enter__()
    for thread in threads:
        thread.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    model.config._attn_implementation = "eager"
    with attending(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    ids = tiny_tokens(1, 5)
    assert tokens(Static(model, 1, 12), ids, 3).shape == (1, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [32, 452])
@pytest.mark.parametrize("batch", [1, 4])
def test_one_token_on_a_gpu(batch: int, length: int) -> None:
    shapes = ((batch, 32, 1, 128), (batch, 8, length, 128), (batch, 8, length, 128))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    mask = torch.zeros(1, length, device="cuda", dtype=torch.bfloat16)
    mask[:, length // 2 :] = torch.finfo(torch.bfloat16).min
    mask = mask.expand(batch, 1, 1, -1)
    exact, _ = sdpa_attention_forward(module(4), q.float(), k.float(), v.float(), mask.float())
    found, _ = grouped(module(4), q, k, v, mask)
    torch.testing.assert_close(found.float(), exact, atol=1e-2, rtol=2e-2)
