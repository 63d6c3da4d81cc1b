"""Calibration data: the windows hold the tokens of the text; misfits with the model are refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from aptq.engine.data import (
    PIECE,
    PROMPT,
    Batches,
    Data,
    Limits,
    check_length,
    check_source,
    limits_of,
    token_stream,
    tokens,
)
from tests.tiny import TINY, VOCABULARY, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, zwölf Boxkämpfer jagen Viktor.\n" * 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def small(source: Path | str, **changes: int | str) -> Data:
    return replace(Data(source=str(source), samples=4, length=16), **changes)


def refused(data: Data) -> str:
    """The message of `check_source`, which has the three lines: what, where, what to do."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\n[^\n]+\n[^\n]+\Z") as error:
        check_source(data)
    return str(error.value)


def test_seed_zero_takes_the_first_windows_of_the_whole_text(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    batches = tokens(small(text_file), tokenizer)
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert batches.ids.dtype == torch.int64
    assert batches.ids.tolist() == np.array(whole[:64]).reshape(4, 16).tolist()
    assert batches.found == len(whole)
    digest = hashlib.sha256(np.array(whole[:64], dtype="<i8").tobytes()).hexdigest()
    assert batches.sha256 == digest
    assert json.loads(json.dumps(batches.record()))["tokens_used"] == 64
    assert str(batches).startswith("4 x 16 = 64 tokens of")


def test_other_seeds_take_windows_at_random_offsets(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = token_stream(small(text_file), tokenizer)[0].tolist()
    one, again, two = (tokens(small(text_file, seed=s), tokenizer).ids for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert all(
        any(stream[i : i + 16] == row for i in range(len(stream) - 15)) for row in one.tolist()
    )


def test_text_that_just_fits_leaves_one_offset(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "fits.txt"
    path.write_text("12345678", encoding="utf-8")
    batches = tokens(small(path, samples=1, length=8, seed=3), tokenizer)
    assert tokenizer.decode(batches.ids[0]) == "12345678"


def test_builtin_text_is_the_same_each_time(tokenizer: PreTrainedTokenizerFast) -> None:
    data = small("builtin:pydoc")
    check_source(data)
    one, two = tokens(data, tokenizer), tokens(data, tokenizer)
    assert one.sha256 == two.sha256
    assert one.whole
    assert tokenizer.decode(one.ids[0]).startswith('The "assert" sta')
    assert one.found > Data().needed
    assert "builtin:pydoc" in refused(small("builtin:pydok"))


def test_self_takes_what_the_sampler_draws(tokenizer: PreTrainedTokenizerFast) -> None:
    def sampler(samples: int, length: int, seed: int, starts: torch.Tensor | None) -> torch.Tensor:
        assert starts is None
        return torch.full((samples, length), seed)

    data = small("self", seed=7)
    check_source(data)
    assert tokens(data, tokenizer, sampler=sampler).ids.unique().tolist() == [7]
    with pytest.raises(ValueError, match="no sampler"):
        tokens(data, tokenizer)


def test_the_model_goes_on_from_places_in_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    def sampler(samples: int, length: int, seed: int, starts: torch.Tensor | None) -> torch.Tensor:
        assert starts is not None
        assert starts.shape == (samples, length // 2)
        return torch.cat([starts, torch.full((samples, length - starts.shape[1]), 9)], 1)

    plain, data = tokens(small("builtin:pydoc"), tokenizer), small("builtin:pydoc", written=3)
    both = tokens(data, tokenizer, sampler=sampler)
    assert torch.equal(both.ids[: len(plain.ids)], plain.ids)
    own = both.ids[len(plain.ids) :]
    assert len(own) == both.written == both.record()["written"] == 3 * len(plain.ids)
    assert (own[:, data.length // 2 :] == 9).all()
    assert (own[:, : data.length // 2] != 9).any(dim=1).all()
    assert data.total == both.ids.numel()
    assert both.sha256 != plain.sha256
    assert f"{len(own)} of them written by the model" in str(both)
    assert torch.equal(both.text, plain.ids)
    assert torch.equal(plain.text, plain.ids)
    assert "no sampler was given" in refused_tokens(data, tokenizer)
    with pytest.raises(ValueError, match="written >= 0"):
        small("builtin:pydoc", written=-1)


def test_long_windows_are_written_in_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = []

    def sampler(samples: int, length: int, seed: int, starts: torch.Tensor | None) -> torch.Tensor:
        assert starts is not None
        asked.append((samples, length, tuple(starts.shape)))
        return torch.arange(samples)[:, None].expand(-1, length)

    data = Data(samples=2, length=PIECE + 6, written=2)
    made = tokens(data, tokenizer, sampler=sampler)
    assert asked == [(5, PIECE, (5, PROMPT))]
    assert made.ids.shape == (6, data.length)
    assert made.ids[2:].flatten().tolist() == [at // PIECE for at in range(4 * data.length)]


def refused_tokens(data: Data, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(ValueError, match="nobody writes") as caught:
        tokens(data, tokenizer)
    return str(caught.value)


def test_too_little_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 40, encoding="utf-8")
    with pytest.raises(ValueError, match=r"40 tokens found, 64 needed .*\nset samples to 2"):
        tokens(small(path), tokenizer)
    with pytest.raises(ValueError, match="use shorter windows"):
        tokens(small(path, length=64), tokenizer)


def test_only_the_beginning_of_a_large_text_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "large.txt"
    path.write_text(TEXT * 30, encoding="utf-8")
    start, whole = token_stream(small(path), tokenizer, characters=100)
    assert not whole
    assert tokenizer.decode(start) == TEXT[:100]
    batches = Batches(start[None, :64], "large", 0, 100, whole, "")
    assert "of the first 100 in" in str(batches)


def test_tokenizer_of_another_model(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    limits = Limits(rows=120, positions=None)
    with pytest.raises(ValueError, match=r"another model\n.*highest id \d+, embedding rows 120"):
        tokens(small(text_file), tokenizer, limits=limits)


def test_windows_longer_than_the_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    limits = Limits(rows=VOCABULARY, positions=15)
    with pytest.raises(ValueError, match="length 16, positions of the model 15"):
        tokens(small("absent"), tokenizer, limits=limits)
    check_length(small("absent"), Limits(rows=1, positions=None))


@pytest.mark.parametrize("name", sorted(TINY))
def test_limits_of_every_family(name: str) -> None:
    assert limits_of(TINY[name]()) == Limits(rows=VOCABULARY, positions=128)


def test_limits_without_stated_positions() -> None:
    text = SimpleNamespace(attribute_map={}, vocab_size=5, to_dict=dict)
    config = SimpleNamespace(get_text_config=lambda: text)
    assert limits_of(config) == Limits(rows=5, positions=None)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 1}, {"seed": -1}])
def test_impossible_windows(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        Data(**wrong)
