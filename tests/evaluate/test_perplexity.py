"""Perplexity equals a plain float64 computation, however the work is cut into pieces."""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aptq.evaluate import perplexity as module
from aptq.evaluate.perplexity import Perplexity, cut_windows, perplexity
from tests.tiny import tiny_network, tiny_tokens

WINDOW = 24


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_network("llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tiny_tokens(1, 4 * WINDOW + 5)[0]


def plain(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """Mean NLL of each window in float64 from one forward pass over all of them."""
    with torch.no_grad():
        chances = model(windows).logits.double().softmax(-1)
    picked = chances[:, :-1].gather(-1, windows[:, 1:, None])
    return (-picked.log()).mean((1, 2)).tolist()


def test_equals_the_plain_computation(model: PreTrainedModel, ids: Tensor) -> None:
    result = perplexity(model, ids, window=WINDOW)
    expected = plain(model, ids[: 4 * WINDOW].view(4, WINDOW))
    assert result.nlls == pytest.approx(expected, rel=1e-6)
    assert (result.windows, result.tokens) == (4, 4 * (WINDOW - 1))
    assert result.nll == pytest.approx(sum(expected) / 4)
    assert result.ppl == pytest.approx(math.exp(sum(expected) / 4))


def test_equals_the_loss_of_the_model(model: PreTrainedModel, ids: Tensor) -> None:
    whole = ids[None]
    with torch.no_grad():
        loss = model(whole, labels=whole).loss.item()
    assert perplexity(model, ids, window=len(ids)).nll == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("batch", [2, 3, 9])
def test_batches_change_nothing(model: PreTrainedModel, ids: Tensor, batch: int) -> None:
    one = perplexity(model, ids, window=WINDOW)
    assert perplexity(model, ids, window=WINDOW, batch=batch).nlls == pytest.approx(one.nlls)


@pytest.mark.parametrize("chunk", [1, 260 * 7, 260 * 23])
def test_chunks_change_nothing(
    model: PreTrainedModel, ids: Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = perplexity(model, ids, window=WINDOW)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert perplexity(model, ids, window=WINDOW).nlls == pytest.approx(one.nlls)


def test_bos_starts_every_window_and_is_not_predicted(model: PreTrainedModel, ids: Tensor) -> None:
    result = perplexity(model, ids, window=WINDOW, bos=256)
    text = ids[: 4 * (WINDOW - 1)].view(4, WINDOW - 1)
    expected = plain(model, torch.cat([torch.full((4, 1), 256), text], 1))
    assert result.nlls == pytest.approx(expected, rel=1e-6)
    assert result.bos == 256


def test_limit_takes_the_first_windows(model: PreTrainedModel, ids: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    result = perplexity(
        model, ids, window=WINDOW, limit=3, batch=2, progress=lambda *done: seen.append(done)
    )
    assert result.nlls == pytest.approx(perplexity(model, ids, window=WINDOW).nlls[:3])
    assert seen == [(2, 3), (3, 3)]


def test_bf16_forward_keeps_the_sum_in_float32(ids: Tensor) -> None:
    model = tiny_network("llama", torch.bfloat16)
    expected = plain(model, ids[: 4 * WINDOW].view(4, WINDOW))
    assert perplexity(model, ids, window=WINDOW, batch=4).nlls == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere2", "opt", "qwen3_next"])
def test_other_families(name: str, ids: Tensor) -> None:
    model = tiny_network(name)
    windows = cut_windows(ids, WINDOW, limit=2)
    result = perplexity(model, ids, window=WINDOW, limit=2)
    assert result.nlls == pytest.approx(plain(model, windows), rel=1e-4)


def test_refusals(model: PreTrainedModel, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="101 tokens found, 102 needed"):
        perplexity(model, ids, window=102)
    with pytest.raises(ValueError, match="impossible"):
        perplexity(model, ids, window=1)
    with pytest.raises(ValueError, match="window 129, positions of the model 128"):
        perplexity(model, ids.repeat(2), window=129)
    with pytest.raises(ValueError, match=r"another model\nhighest id 260"):
        perplexity(model, ids.clamp(min=260), window=WINDOW)
    with pytest.raises(ValueError, match="training mode"):
        perplexity(tiny_network("llama").train(), ids, window=WINDOW)


def test_figures_beyond_the_range() -> None:
    assert Perplexity((800.0,), 2).ppl == math.inf
    assert math.isnan(Perplexity((math.nan,), 2).ppl)
