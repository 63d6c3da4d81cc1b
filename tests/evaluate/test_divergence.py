"""KL equals a float64 computation from its definition; stored logits change nothing."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from aptq.evaluate import perplexity as module
from aptq.evaluate.divergence import divergence, save_logits
from aptq.evaluate.perplexity import perplexity
from tests.tiny import tiny_network, tiny_tokens

WINDOW = 24


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_network("llama")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    network = tiny_network("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tiny_tokens(1, 3 * WINDOW + 5)[0]


def test_equals_the_definition(
    model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 260 * 7)  # several chunks in a window
    result = divergence(model, reference, ids, window=WINDOW)
    windows = ids[: 3 * WINDOW].view(3, WINDOW)
    with torch.no_grad():
        p, q = (m(windows).logits[:, :-1].double().softmax(-1) for m in (reference, model))
    expected = (p * (p / q).log()).sum(-1)
    assert result.kls == pytest.approx(expected.mean(1).tolist(), rel=1e-4)
    assert result.kl == pytest.approx(expected.mean().item(), rel=1e-4)
    assert result.kl > 1e-3
    equal = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.agreement == pytest.approx(equal)
    assert 0 < equal < 1


def test_gives_the_perplexity_of_both(
    model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor
) -> None:
    result = divergence(model, reference, ids, window=WINDOW, bos=256, limit=2)
    assert result.model == perplexity(model, ids, window=WINDOW, bos=256, limit=2)
    assert result.reference == perplexity(reference, ids, window=WINDOW, bos=256, limit=2)


def test_equal_models_do_not_diverge(model: PreTrainedModel, ids: Tensor) -> None:
    result = divergence(model, model, ids, window=WINDOW)
    assert math.isclose(result.kl, 0.0, abs_tol=1e-7)
    assert result.agreement == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_logits_change_nothing(
    model: PreTrainedModel, dtype: torch.dtype, ids: Tensor, tmp_path: Path
) -> None:
    reference = tiny_network("llama", dtype)
    save_logits(reference, ids, tmp_path / "new", window=WINDOW)
    stored = divergence(model, tmp_path / "new", ids, window=WINDOW)
    assert stored == divergence(model, reference, ids, window=WINDOW)


def test_stored_logits_of_other_windows(
    model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    save_logits(
        reference, ids, tmp_path, window=WINDOW, limit=2, progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match="no logits of window 2"):
        divergence(model, tmp_path, ids, window=WINDOW)
    with pytest.raises(ValueError, match="other tokens"):
        divergence(model, tmp_path, ids.flip(0), window=WINDOW)


def test_models_of_different_vocabularies(model: PreTrainedModel, ids: Tensor) -> None:
    other = tiny_network("llama")
    other.resize_token_embeddings(264)
    with pytest.raises(ValueError, match="model 260, reference 264"):
        divergence(model, other, ids, window=WINDOW)
