"""Timing: who is measured how often and in which order, ratios of one turn, torch's own int4."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from aptq.cli import app
from aptq.evaluate import speed
from aptq.evaluate.speed import Load, TorchInt4, compare, resident, with_torch_int4
from tests.tiny import TINY, tiny_model

LOAD = Load(batches=(1, 3), prompt=7, context=4, tokens=5, turns=3)


def tiny(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(TINY["llama"](), dtype=torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of which every reading comes 1 s later, and one model whose steps count double."""
    seen: list[tuple[str, int, int]] = []
    ticks = itertools.count()
    models = {"a": tiny(), "b": tiny()}
    for name, model in models.items():

        def note(
            _module: nn.Module, _args: object, more: dict[str, torch.Tensor], name: str = name
        ) -> None:
            seen.append((name, *more["input_ids"].shape))
            next(ticks) if name == "b" else None

        model.register_forward_pre_hook(note, with_kwargs=True)
    monkeypatch.setattr(speed, "_now", lambda _model: float(next(ticks)))
    told: list[tuple[int, int]] = []
    rows = compare(models, "a", LOAD, lambda done, total: told.append((done, total)))
    assert [(row.case, row.batch, row.model) for row in rows] == [
        (case, batch, name)
        for case, batch in (("prefill", 1), ("decode", 1), ("decode", 3))
        for name in "ab"
    ]
    found = {(row.case, row.batch, row.model): row for row in rows}
    assert found["prefill", 1, "a"].rates == (7.0,) * 3
    assert found["prefill", 1, "b"].rate == 3.5
    assert found["decode", 3, "a"].rate == 3.0
    assert {row.ratio for row in rows if row.model == "a"} == {1.0}
    assert {row.ratio for row in rows if row.model == "b"} == {0.5}
    assert told == [(done, 18) for done in range(19)]
    # one prefill and one decoding of each beforehand; then a b, b a, a b
    measured = [name for name, rows_, width in seen if (rows_, width) == (1, 7)]
    assert "".join(measured) == "ab" + "ab" + "ba" + "ab"
    steps = [width for name, rows_, width in seen if name == "a" and rows_ == 3]
    assert steps == [4, 1, 1, 1, 1, 1] * 3


def test_rates_are_medians_and_ratios_of_one_turn() -> None:
    row = speed.Row("m", "decode", 1, (1.0, 9.0, 2.0), (0.5, 3.0, 0.7))
    assert (row.rate, row.ratio) == (2.0, 0.7)
    assert json.loads(json.dumps(row.to_json()))["rates"] == [1.0, 9.0, 2.0]


def test_resident_counts_shared_storage_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert resident(model) == 2 * 256
    model[1].weight = model[0].weight
    assert resident(model) == 256


@pytest.mark.parametrize("columns", [128, 192, 96])
def test_torch_int4_is_rounding_to_nearest(columns: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(columns, 32).bfloat16()
    x = torch.randn(2, 3, columns).bfloat16()
    with torch.no_grad():
        wanted, found = linear(x), TorchInt4(linear)(x)
    assert found.shape == wanted.shape
    error = float((found - wanted).norm() / wanted.norm())
    assert 0.01 < error < 0.15  # of four bits: not the original's, and no nonsense


def test_torch_int4_leaves_out_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"(?s)cannot hold.*32 x 40.*leave"):
        TorchInt4(nn.Linear(40, 32))
    model = tiny()  # 48 columns
    assert with_torch_int4(model) == 0
    assert not any(isinstance(module, TorchInt4) for module in model.modules())


def test_bench_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, out = tiny_model("llama", tmp_path), tmp_path / "found.json"

    def call(*words: str | Path) -> str:
        done = CliRunner().invoke(app, ["bench", *map(str, words)])
        assert done.exit_code == 0, done.output
        return done.stdout

    before = set(tmp_path.iterdir())
    small = ("--samples", "2", "--length", "16", "--recipe", "gptq", "--grid", "int4-g16-z")
    cost = json.loads(call("compress", model, *small, "--out", out, "--json"))
    assert set(tmp_path.iterdir()) == {*before, out}
    assert json.loads(out.read_text()) == cost
    assert (cost["blocks"], cost["tokens"]) == (2, 32)
    assert cost["seconds_per_block"] == pytest.approx(cost["seconds"] / 2)
    assert cost["peak_bytes"] > 1e7
    quick = ("--batches", "1,2", "--prompt", "8", "--tokens", "2", "--turns", "1")
    shown = call("run", model, "--reference", model, *quick, "--out", out)
    found = json.loads(out.read_text())
    assert [row["model"] for row in found["rows"]] == ["packed", "bf16"] * 3
    assert "prefill" in shown
    assert found["resident_bytes"]["bf16"] > 1e4
    for words, message in ((["--batches", "1,x"], "batch sizes"), (["--turns", "0"], "nothing")):
        done = CliRunner().invoke(app, ["bench", "run", str(model), *words])
        assert done.exit_code == 2
        assert message in done.output
