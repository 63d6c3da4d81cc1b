"""assess: several texts, intervals, positions, paired differences and tasks of one call."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from aptq.assessing import Exam, assess
from aptq.engine.data import Data
from aptq.evaluate.intervals import interval
from aptq.evaluate.perplexity import Perplexity, by_position, perplexity, position_bins
from tests.tiny import tiny_model, tiny_network

WINDOW = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one family and two texts of 5 and 3 windows (a token is a byte)."""
    folder = tmp_path_factory.mktemp("assess")
    found = {name: folder / f"{name}.txt" for name in ("one", "two")}
    found["one"].write_text("what is seen is kept, what is not is lost. " * 3)
    found["two"].write_text("0123456789 " * 7)
    for seed in (0, 1):
        made = tiny_model("llama", folder / str(seed), seed=seed)
        found[f"model{seed}"] = made
    return found


def both(folders: dict[str, Path]) -> list[Data]:
    return [Data(source=str(folders[name])) for name in ("one", "two")]


def test_totals_and_texts(folders: dict[str, Path]) -> None:
    texts = both(folders)
    exam = Exam(texts=tuple(texts), window=WINDOW)
    found = assess(folders["model1"], reference=folders["model0"], exam=exam)
    alone = [
        assess(folders["model1"], reference=folders["model0"], data=text, window=WINDOW)
        for text in texts
    ]
    assert found["text"] == ", ".join(text.source for text in texts)
    assert [part["windows"] for part in found["texts"]] == [5, 3]
    assert found["windows"] == 8
    for part, one in zip(found["texts"], alone, strict=True):
        for key in ("perplexity", "perplexity_interval", "kl", "agreement", "positions"):
            assert part[key] == one[key]
        assert one["texts"] == []
    assert found["nlls"] == alone[0]["nlls"] + alone[1]["nlls"]
    assert found["nll"] == pytest.approx(sum(found["nlls"]) / 8)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["kl"] == pytest.approx((5 * alone[0]["kl"] + 3 * alone[1]["kl"]) / 8)
    lower, upper = interval(found["nlls"]) or (0, 0)
    assert found["perplexity_interval"] == [math.exp(lower), math.exp(upper)]
    low, high = found["kl_interval"]
    assert low < found["kl"] < high


def test_differences_are_paired(folders: dict[str, Path]) -> None:
    data = both(folders)[0]
    found = assess(folders["model1"], reference=folders["model0"], data=data, window=WINDOW)
    other = assess(folders["model0"], data=data, window=WINDOW)
    assert found["reference"]["nlls"] == pytest.approx(other["nlls"])
    moved = [a - b for a, b in zip(found["nlls"], other["nlls"], strict=True)]
    assert found["difference"] == pytest.approx(sum(moved) / 5)
    assert found["difference_interval"] == pytest.approx(list(interval(moved) or ()), abs=1e-6)
    assert other["difference"] is None
    assert other["kl_interval"] is None


def test_positions(folders: dict[str, Path]) -> None:
    found = assess(folders["model1"], data=both(folders)[1], window=WINDOW)
    assert [(one["first"], one["last"]) for one in found["positions"]] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 23),
    ]
    sizes = [1, 2, 4, 8, 8]
    nlls = [math.log(one["perplexity"]) for one in found["positions"]]
    total = sum(size * nll for size, nll in zip(sizes, nlls, strict=True))
    assert total / 23 == pytest.approx(found["nll"])
    assert {one["kl"] for one in found["positions"]} == {None}


def test_bins_are_exact() -> None:
    assert position_bins(2) == [(1, 1)]
    assert position_bins(9) == [(1, 1), (2, 3), (4, 7), (8, 8)]
    values = torch.arange(8, dtype=torch.float64)
    assert by_position(values) == (0.0, 1.5, 4.5, 7.0)


def test_sums() -> None:
    one, two = (
        Perplexity((1.0,), 4, None, ((1.0, 2.0),)),
        Perplexity((3.0,), 4, None, ((0.0, 1.0),)),
    )
    assert one + two == Perplexity((1.0, 3.0), 4, None, ((1.0, 2.0), (0.0, 1.0)))
    with pytest.raises(AssertionError):
        one + Perplexity((3.0,), 5)


def test_perplexity_is_that_of_the_windows(folders: dict[str, Path]) -> None:
    ids = torch.tensor([list(range(100))]).flatten()
    model = tiny_network("llama", seed=1)
    found = perplexity(model, ids, window=WINDOW)
    assert len(found.binned) == found.windows == 4
    assert {len(row) for row in found.binned} == {5}


@pytest.mark.filterwarnings("ignore")
def test_tasks_beside_the_text(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    path = tmp_path / "task.jsonl"
    rows: list[dict[str, Any]] = [
        {"question": f"item {n}", "choices": [f"a{n}", f"{n * 7} b", "c"], "label": n % 3}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exam = Exam(texts=(both(folders)[0],), window=WINDOW, tasks=(str(path),), limit=8, seed=3)
    found = assess(folders["model1"], reference=folders["model0"], exam=exam)
    ours, theirs = (assess(folders[name], exam=exam) for name in ("model1", "model0"))
    for row, one, two in zip(found["tasks"], ours["tasks"], theirs["tasks"], strict=True):
        assert (row["value"], row["stderr"], row["items"]) == (one["value"], one["stderr"], 8)
        assert row["against"]["value"] == two["value"]
        assert row["against"]["difference"] == pytest.approx(one["value"] - two["value"])
        assert row["against"]["test"] == "McNemar"
        assert one["against"] is None


def test_unreadable_texts_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt"):
        Exam(texts=(Data(source=str(tmp_path / "none.txt")),))
