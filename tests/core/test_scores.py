"""Score tables: units, sums over a plan, merging, and a closed file format."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from aptq.core.grid import Grid
from aptq.core.plan import PartSpec, Plan, Target
from aptq.core.scores import Scores

LOW, HIGH = Target((PartSpec(Grid("int2", 64)),)), Target((PartSpec(Grid("int4", 64)),))
SCORES = Scores(
    measure="fisher",
    unit="nats",
    candidates=(str(LOW), str(HIGH)),
    losses={"a": (0.5, 0.1), "b": (0.25, -0.01)},
    noise={"a": (0.03, 0.01), "b": (0.04, 0.02)},
    window=512,
    profiles={"a": (4.0, 1.0, 0.5)},
    record={"source": "model", "seed": "0"},
)


def plan(a: Target, b: Target) -> Plan:
    return Plan({"a": a, "b": b})


def test_a_plan_s_loss_is_the_sum_of_clipped_losses() -> None:
    assert SCORES.nats(plan(LOW, LOW)) == (0.75, pytest.approx(0.05))
    assert SCORES.nats(plan(LOW, HIGH)) == (0.5, pytest.approx(math.hypot(0.03, 0.02)))
    assert SCORES.nats(plan(Target(), Target())) == (0.0, 0.0)
    assert SCORES.losses["b"][1] == -0.01  # raw values stay


def test_relative_scores_need_a_factor() -> None:
    relative = dataclasses.replace(SCORES, unit="relative")
    assert relative.nats(plan(LOW, LOW)) is None
    fitted = dataclasses.replace(relative, factor=2.0, residual=0.1)
    assert fitted.nats(plan(LOW, LOW)) == (1.5, pytest.approx(math.hypot(0.1, 0.15)))


@pytest.mark.parametrize(
    "wrong",
    [
        plan(Target((PartSpec(Grid("int3")),)), LOW),
        Plan({"c": LOW}),
        plan(LOW, Target(HIGH.parts * 2)),
    ],
)
def test_what_was_not_measured_is_refused(wrong: Plan) -> None:
    with pytest.raises(ValueError, match="no score for") as caught:
        SCORES.nats(wrong)
    assert len(str(caught.value).splitlines()) == 3


def test_a_kept_layer_needs_no_score() -> None:
    assert SCORES.nats(Plan({"a": LOW, "lm_head": Target()})) == (0.5, 0.03)


def test_layers_of_another_model_are_refused() -> None:
    SCORES.check(["a", "b", "c"])
    with pytest.raises(ValueError, match="layer 'b', which the model lacks"):
        SCORES.check(["a"])


def test_merge_joins_layers_or_candidates() -> None:
    other = dataclasses.replace(SCORES, losses={"c": (1.0, 0.5)}, noise={"c": (0.0, 0.0)})
    both = SCORES.merge(dataclasses.replace(other, window=0, profiles={}, factor=3.0))
    assert list(both.losses) == ["a", "b", "c"]
    assert (both.profiles, both.window, both.factor) == (SCORES.profiles, 512, None)
    wider = SCORES.merge(dataclasses.replace(SCORES, candidates=("int3-g64", "bf16")))
    assert wider.candidates == ("int2-g64", "int4-g64", "int3-g64", "bf16")
    assert wider.losses["a"] == (0.5, 0.1, 0.5, 0.1)


@pytest.mark.parametrize(
    "change",
    [{}, {"unit": "relative"}, {"measure": "kl"}, {"window": 9}, {"candidates": ("int3", "bf16")}],
)
def test_tables_that_do_not_fit_are_not_merged(change: dict[str, Any]) -> None:
    change = (
        {**change, "candidates": ("int3-g64", "int2-g64")} if "candidates" in change else change
    )
    if change and "candidates" not in change:
        change = {**change, "losses": {"c": (1.0, 0.5)}, "noise": {"c": (0.0, 0.0)}}
    with pytest.raises(ValueError, match="cannot be merged"):
        SCORES.merge(dataclasses.replace(SCORES, **change))


def test_files_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    exact = dataclasses.replace(SCORES, losses={"a": (1 / 3, 1e-300), "b": (0.1 + 0.2, 0.0)})
    exact.save(path)
    assert Scores.load(path) == exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "exactly the keys"),
        ({"version": 2}, "another version"),
        ({"unit": "bits"}, "neither nats nor relative"),
        ({"measure": 3}, "measure must be a text"),
        ({"candidates": "int4-g64"}, "list of texts"),
        ({"candidates": ["int2-g64", 4]}, "must be texts"),
        ({"candidates": ["int2-g64", "int99"]}, "int99"),
        ({"candidates": ["int2-g64", "int2-g64"]}, "differ"),
        ({"losses": {"a": [0.5, 0.1]}}, "have losses"),
        ({"losses": {"a": [0.5], "b": [1, 2]}}, "needs 2 finite"),
        ({"losses": {"a": [0.5, math.nan], "b": [1, 2]}}, "needs 2 finite"),
        ({"losses": {"a": [0.5, True], "b": [1, 2]}}, "must be numbers"),
        ({"losses": [1]}, "must be a table"),
        ({"noise": {"a": [0.5, -0.1], "b": [1, 2]}}, "not below 0"),
        ({"factor": 0}, "factor"),
        ({"factor": "1"}, "must be numbers"),
        ({"window": 0}, "1 profiles"),
        ({"record": {"seed": 0}}, "must be texts"),
    ],
)
def test_broken_files_are_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "scores.json"
    SCORES.save(path)
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        Scores.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_files_that_are_no_scores(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="not scores"):
        Scores.load(path)
