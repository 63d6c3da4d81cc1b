"""Summary and card of a run folder: sums, means, and clear words when the log is broken."""

import json
from pathlib import Path

import pytest

from aptq.report import card
from aptq.report.summary import errors, read

START = {"event": "start", "source": "a/model", "bits": 4.5, "bytes_before": 100}
START |= {"data": {"tokens_used": 64}}
DONE = {"event": "done", "seconds": 2.5, "bytes_after": 40}


def layer(name: str, role: str, error: float, **counts: float) -> dict[str, object]:
    sizes = {"weights": 8, "before": 16, "after": 5}
    head = {"event": "layer", "name": name, "role": role, "grid": "int4-row"}
    return {**head, **sizes, "error": error, "counts": counts}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    events = [START, layer("a", "q", 0.1, fallbacks=1, dead=3), layer("b", "q", 0.3, dead=2)]
    events += [layer("c", "o", 0.5), {"event": "block", "block": 0, "seconds": 1.0}, DONE]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "recipe.toml").write_text("seed = 7\n")
    return tmp_path


def test_rows_and_totals(run: Path) -> None:
    found = read(run)
    first, second = found.rows
    assert (first.role, first.layers, first.bits, first.fallbacks) == ("q", 2, 5.0, 1)
    assert first.error == pytest.approx(0.2)
    assert (first.before, first.after, second.role) == (32, 10, "o")
    assert (found.layers, found.fallbacks, found.tokens) == (3, 1, 64)
    assert found.counts == {"fallbacks": 1, "dead": 5}
    assert found.evaluation is None
    assert found.to_json()["fallbacks"] == 1
    assert errors(run) == {"a": 0.1, "b": 0.3, "c": 0.5}


def test_allocation_is_told(run: Path) -> None:
    log = run / "log.jsonl"
    start = {**START, "rule": {"rule": "milp", "measure": "fisher"}, "expected_loss": [0.5, 0.25]}
    other = {**layer("d", "q", 0.9), "grid": "int2-row", "after": 3}
    lines = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(start), json.dumps(other), *lines[1:]]) + "\n")
    found = read(run)
    assert found.histogram == {"int4-row": 3, "int2-row": 1}
    mixed, single = found.roles
    assert (mixed.role, mixed.grid, mixed.layers, mixed.after) == ("q", "2 grids", 3, 13)
    assert mixed.bits == pytest.approx(8 * 13 / 24)
    assert mixed.error == pytest.approx((0.1 + 0.3 + 0.9) / 3)
    assert single.grid == "int4-row"
    assert found.expected_loss == (0.5, 0.25)
    card.write(run)
    text = (run / "README.md").read_text()
    assert "- Plan: rule milp, measure fisher; layers: 3 x int4-row, 1 x int2-row" in text
    assert "- Expected loss: 0.5000 ± 0.2500 nats a token" in text


def test_card_has_recipe_and_figures(run: Path) -> None:
    card.write(run)
    text = (run / "README.md").read_text()
    assert "seed = 7" in text
    assert "1 of 3" in text
    assert "Not evaluated yet" in text
    assert "Expected loss" not in text
    result = {"text": "t", "perplexity": 9.5, "kl": 0.25, "agreement": 0.875}
    (run / "eval.json").write_text(json.dumps({**result, "reference": {"perplexity": 9.0}}))
    card.write(run)
    text = (run / "README.md").read_text()
    assert "9.500 (original 9.000)" in text
    assert "0.2500 nats" in text
    (run / "eval.json").write_text(json.dumps({**result, "reference": None}))
    card.write(run)
    assert "original 9" not in (run / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["", "{", '{"event": "start"}', '{"event": "dance"}', json.dumps(START)]
)
def test_broken_logs_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match="no complete run log") as error:
        read(tmp_path)
    assert len(str(error.value).splitlines()) == 3


def test_missing_log_is_named(tmp_path: Path) -> None:
    for reader in (read, errors):
        with pytest.raises(ValueError, match="no complete run log"):
            reader(tmp_path)
