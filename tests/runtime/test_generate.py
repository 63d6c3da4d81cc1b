"""Generation: equal to transformers' greedy search, seeded draws, whole characters."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aptq.runtime.generate import _draw, sample, stream, write
from aptq.runtime.open import find_device, open_any, original
from tests.tiny import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("generate"))


def test_greedy_is_that_of_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tiny_tokens(1, 9)
    ours = torch.stack(list(stream(model, ids, 12)), 1)
    model.generation_config.eos_token_id = None
    theirs = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert torch.equal(ours, theirs[:, 9:])


def test_draws_depend_on_the_seed_alone(folder: Path) -> None:
    model = original(folder, torch.device("cpu")).model
    state = torch.get_rng_state()
    first = sample(model, 5, 7, 1, bos=256, batch=2)
    assert torch.equal(first, sample(model, 5, 7, 1, bos=256, batch=2))
    assert not torch.equal(first, sample(model, 5, 7, 2, bos=256, batch=2))
    assert torch.equal(state, torch.get_rng_state())
    assert (first.shape, first.dtype) == ((5, 7), torch.int64)
    assert (first[:, 0] == 256).all()
    assert sample(model, 4, 3, 1, bos=None)[:, 0].unique().numel() > 1


def test_windows_go_on_from_their_starts(folder: Path) -> None:
    model = original(folder, torch.device("cpu")).model
    starts = tiny_tokens(3, 4)
    found = sample(model, 3, 9, 1, bos=None, starts=starts)
    assert found.shape == (3, 9)
    assert torch.equal(found[:, :4], starts)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(20_000, 1, generator=generator, dtype=torch.float64)
    shares = _draw(logits, chance).bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.01, rtol=0)
    assert _draw(logits[:1], torch.ones(1, 1, dtype=torch.float64)) == 2


def test_text_comes_in_pieces(folder: Path) -> None:
    model, tokenizer = original(folder, torch.device("cpu"))
    pieces = list(write(model, tokenizer, "Hi", 12, chat=False))
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    whole = tokenizer.decode([int(token) for token in stream(model, ids, 12)])
    assert whole.startswith("".join(pieces))
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(write(model, tokenizer, "", 3, chat=False))


def test_generation_stops_at_the_end_token(folder: Path) -> None:
    model, tokenizer = original(folder, torch.device("cpu"))
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    first = int(next(stream(model, ids, 1)))
    model.generation_config.eos_token_id = [first]
    assert list(write(model, tokenizer, "Hi", 5, chat=False)) == []


def test_chat_template_is_used(folder: Path) -> None:
    model, tokenizer = original(folder, torch.device("cpu"))
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    templated = "".join(write(model, tokenizer, "Hi", 8))
    assert templated == "".join(write(model, tokenizer, "<Hi>", 8, chat=False))


def test_open_any_opens_ordinary_models(folder: Path) -> None:
    model, tokenizer = open_any(folder, torch.device("cpu"))
    assert not model.training
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folder))


def test_devices_are_checked() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="no device 'cuda:77'"):
        find_device("cuda:77")
