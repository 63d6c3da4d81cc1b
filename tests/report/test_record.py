"""What a run leaves for its report: stages, drift, phases, front; and what the terminal shows."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from aptq.cli import app
from aptq.report.facts import collect
from aptq.terminal import BARS, spark
from aptq.work import Clock, Step
from tests.report.folders import write_run
from tests.tiny import tiny_model

RECIPE = """
grids = ['int2-g16-z', 'int3-g16-z', 'int4-g16-z', 'bf16']
[data]
samples = 4
length = 32
[measure]
use = 'fisher'
[allocate]
use = 'milp'
[[stage]]
use = 'gptq'
rows = 'gradient'
drift = 0.25
[[stage]]
use = 'descent'
"""


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("record")
    model, recipe, out = tiny_model("llama", base), base / "mixed.toml", base / "run"
    recipe.write_text(RECIPE)
    done = run("compress", model, "--budget", "5bpw", "--recipe", recipe, "--out", out, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    return out


def test_log_has_what_the_report_needs(folder: Path) -> None:
    found = collect(folder)
    errors = {(x["block"], x["stage"]): x["error"] for x in found.stages if "error" in x}
    assert set(errors) == {(block, stage) for block in (0, 1) for stage in (0, 1)}
    for block in (
        0,
        1,
    ):  # descent accepts a larger error of the weights for a smaller one of outputs
        layers = [cell for cell in found.cells if cell.block == block]
        worst, least = max(x.error for x in layers), min(x.error for x in layers)
        assert least <= errors[block, 1] <= worst
    (drift,) = [x["drift"] for x in found.stages if "drift" in x]  # the last block feeds nothing
    assert 0 < drift < 1
    assert all(cell.damping == 0.01 for cell in found.cells)
    assert all(cell.score is not None for cell in found.cells)
    assert found.front is not None
    at = [point[0] for point in found.front["points"]]
    assert at == sorted(at)
    assert at[0] < found.summary.bits < at[-1]
    loss = dict(zip(at, (point[2] for point in found.front["points"]), strict=True))
    above = min(x for x in at if x >= found.summary.bits)
    assert found.summary.expected_loss is not None
    assert found.summary.expected_loss[0] >= loss[above] * 0.999
    assert {"open the model", "measure", "compress 5bpw"} <= set(found.summary.phases)
    assert sum(x["seconds"] for x in found.summary.phases.values()) <= found.summary.seconds
    assert min(x["memory"] for x in found.summary.phases.values()) > 1 << 26


def test_drift_is_none_of_a_model_that_stays(tmp_path: Path) -> None:
    """16 bits in a recipe that keeps a second stream: both are the same."""
    model, recipe = tiny_model("llama", tmp_path), tmp_path / "mixed.toml"
    recipe.write_text(RECIPE)
    words = ["--grid", "bf16", "--recipe", recipe, "--out", tmp_path / "run", "--quiet"]
    assert run("compress", model, *words).exit_code == 0
    drift = [x["drift"] for x in collect(tmp_path / "run").stages if "drift" in x]
    assert drift == [pytest.approx(0.0, abs=1e-4)]


def test_clock_gives_time_to_the_phase_that_ends() -> None:
    seen: list[Step | str] = []
    clock = Clock(seen.append)
    clock(Step("one", 0, 2))
    clock.at -= 5
    clock(Step("one", 1, 2))
    clock("a line")
    clock.at -= 7
    clock(Step("two", 0, 1))  # between phases: nobody's
    clock.at -= 3
    clock(Step("two", 1, 1))
    assert clock.phases["one"]["seconds"] == pytest.approx(5, abs=0.5)
    assert clock.phases["two"]["seconds"] == pytest.approx(3, abs=0.5)
    assert clock.phases["two"]["memory"] > 1 << 20
    assert [type(event) for event in seen] == [Step, Step, str, Step, Step]


def test_terminal_shows_the_depth(folder: Path) -> None:
    text = run("info", folder).output
    found = collect(folder).summary
    assert f"bits by block  {spark([bits for bits, _ in found.blocks])}" in text
    assert "error by block" in text
    assert "compress 5bpw" in text
    assert "; memory " in text
    data = json.loads(run("info", folder, "--json").stdout)
    assert len(data["run"]["blocks"]) == 2


def test_sparks_keep_the_order() -> None:
    assert spark([1.0, 2.0, 8.0]) == f"{BARS[0]}{BARS[1]}{BARS[-1]}"
    assert spark([3.0, 3.0]) == BARS[0] * 2


def test_command_writes_files(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    done = run("report", one, two)
    assert done.exit_code == 0, done.output
    lines = [f"written to {folder / 'report.html'}" for folder in (one, two)]
    assert done.output.split() == " ".join(lines).split()
    both = tmp_path / "both.html"
    done = run("report", "--compare", one, two, "--out", both, "--json")
    assert json.loads(done.stdout) == {"out": [str(both)]}
    assert both.stat().st_size > 1_000_000


def test_command_refuses_in_three_lines(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    done = run("report", one, one, "--out", tmp_path / "x.html")
    assert (done.exit_code, len(done.output.strip().splitlines())) == (2, 3)
    done = run("report", tmp_path)
    assert (done.exit_code, "no complete run log" in done.output) == (2, True)
