"""Text sources: every kind is read alike, and what is no text is named before any model work."""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from aptq.engine.data import (
    Data,
    check_source,
    token_stream,
    tokens,
)
from tests.tiny import tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, zwölf Boxkämpfer jagen Viktor.\n" * 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def small(source: Path | str, **changes: int | str) -> Data:
    return replace(Data(source=str(source), samples=4, length=16), **changes)


def refused(data: Data) -> str:
    """The message of `check_source`, which has the three lines: what, where, what to do."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\n[^\n]+\n[^\n]+\Z") as error:
        check_source(data)
    return str(error.value)


@pytest.mark.parametrize("form", ["jsonl", "json", "strings"])
def test_documents_are_joined_by_an_empty_line(
    form: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = ["first document", "second"]
    rows = [{"id": 1, "body": text} for text in documents]
    path = tmp_path / ("rows.jsonl" if form == "jsonl" else "rows.json")
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(rows if form == "json" else documents), encoding="utf-8")
    data = small(path, text_key="body")
    check_source(data)
    ids, whole = token_stream(data, tokenizer)
    assert whole
    assert tokenizer.decode(ids) == "first document\n\nsecond"


def test_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["one", "two"]}), path)
    assert tokenizer.decode(token_stream(small(path), tokenizer)[0]) == "one\n\ntwo"
    assert "keys present: n, text" in refused(small(path, text_key="body"))
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in refused(small(path))


def test_missing_extras_are_named_with_their_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused(small(path)).endswith("pip install pyarrow")
    assert refused(small("hub:some/set")).endswith("pip install datasets")


def test_hub_set(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, **rest: object) -> list[dict[str, str]]:
        calls.append((name, config, rest))
        if name == "absent":
            raise ConnectionError("no network")
        return [{"text": "one"}, {"text": "two"}]

    fake = ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = small("hub:some/set", config="en", split="validation")
    assert tokenizer.decode(token_stream(data, tokenizer)[0]) == "one\n\ntwo"
    assert calls == [("some/set", "en", {"split": "validation", "streaming": True})]
    message = refused(small("hub:absent"))
    assert "no network" in message
    assert "nothing else is taken" in message


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_ready_ids(ending: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.arange(96, dtype=np.uint16).reshape(6, 16)
    path = tmp_path / f"ids.{ending}"
    if ending == "npy":
        np.save(path, ids)
    else:
        save_file({"ids": torch.from_numpy(ids.astype(np.int32)), "b": torch.ones(1)}, path)
    check_source(small(path))
    assert tokens(small(path), tokenizer).ids.tolist() == ids[:4].tolist()


def test_ids_must_be_non_negative_integers(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    for wrong in (np.ones(4), np.array([-1, 2]), np.array([], dtype=np.int32)):
        np.save(path, wrong)
        assert "no token ids" in refused(small(path))
    np.save(path, np.array(["text"]))
    assert "cannot be read" in refused(small(path))
    np.save(path, np.array([{}]), allow_pickle=True)
    assert "cannot be read" in refused(small(path))
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "ids.safetensors")
    assert "cannot be read" in refused(small(tmp_path / "ids.safetensors"))
    (tmp_path / "ids.safetensors").write_bytes(b"damaged")
    assert "cannot be read" in refused(small(tmp_path / "ids.safetensors"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (b" \n\t\n", "no text"),
        (gzip.compress(b"text", mtime=0), "gzip data"),
        (b"PK\x03\x04rest", "zip archive"),
        (TEXT.encode("utf-16"), "UTF-16"),
        (TEXT.encode("utf-16-le"), "UTF-16 without a mark"),
        (TEXT.encode("latin-1"), "0xf6"),
        (bytes(range(128, 256)), "binary data"),
    ],
)
def test_wrong_bytes_are_named(content: bytes, found: str, tmp_path: Path) -> None:
    for name in ("text.txt", "rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        message = refused(small(path))
        assert found in message
        assert str(path) in message


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "does not exist" in refused(small(tmp_path / "absent.txt"))
    assert "no regular file" in refused(small(tmp_path))


def test_a_character_on_the_edge_of_the_head_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "edge.txt"
    path.write_text("a" * 65535 + "ö" * 40000, encoding="utf-8")
    check_source(small(path))


def test_wrong_encoding_behind_the_head(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "late.txt"
    path.write_bytes(b"a" * 200000 + b"\xff")
    check_source(small(path))
    with pytest.raises(ValueError, match=r"not UTF-8 text\n.*0xff"):
        tokens(small(path), tokenizer)


def test_a_mark_at_the_start_of_utf8_is_not_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "marked.txt"
    path.write_text("text", encoding="utf-8-sig")
    check_source(small(path))
    assert token_stream(small(path), tokenizer)[0].numel() == 4


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"content": "a", "id": 1}', "no 'text'; keys present: content, id"),
        ('{"text": 5}', "int instead of text"),
        ("[1, 2]", "list instead of text"),
        ("{broken", "not valid JSON"),
        ("[" * 200000, "not valid JSON"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_wrong_rows_are_named_with_their_line(line: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + line + "\n", encoding="utf-8")
    message = refused(small(path))
    assert found in message
    assert "line 2" in message


def test_a_wrong_row_behind_the_first(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"body": "bad"}\n', encoding="utf-8")
    check_source(small(path))
    with pytest.raises(ValueError, match="line 2: no 'text'; keys present: body"):
        tokens(small(path), tokenizer)
