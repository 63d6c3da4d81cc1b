"""compare: sizes of every format, the same figures as assess, the front, refusals, the command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from aptq.assessing import Exam, assess
from aptq.cli import app
from aptq.comparing import Compared, compare, size_of, write_html
from aptq.engine.data import Data
from aptq.exporting import export_to
from aptq.store.checkpoint import Checkpoint
from tests.export.test_gguf import compressed, source
from tests.tiny import tiny_model

WINDOW = 24


def run(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, an int4 run of it, and the run in the formats of other engines."""
    folder = tmp_path_factory.mktemp("compare")
    original = source(folder / "original", attention_bias=False)
    found = {"original": original, "run": compressed(original, folder / "run", "int4-g32")}
    for name in ("gptq", "compressed-tensors"):
        found[name] = export_to(found["run"], folder / name, to=name)
    found["gguf"] = export_to(found["run"], folder / "tiny.gguf", to="gguf")
    found["text"] = folder / "text.txt"
    found["text"].write_text("the cat sat on the mat and it was late, don't you think? " * 9)
    return found


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded models go below the folder of the tests."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


@pytest.fixture(scope="module")
def exam(made: dict[str, Path]) -> Exam:
    return Exam(texts=(Data(source=str(made["text"])),), window=WINDOW)


def test_sizes(made: dict[str, Path], tmp_path: Path) -> None:
    whole, packed = size_of(made["original"]), size_of(made["run"])
    assert (whole.format, whole.bits) == ("bfloat16", 16.0)
    files = [one for one in made["original"].iterdir() if one.is_file()]
    assert whole.nbytes == sum(one.stat().st_size for one in files)
    opened = Checkpoint.open(made["run"])
    held = (made["run"] / "checkpoint").iterdir()
    assert packed == ("aptq", sum(one.stat().st_size for one in held), 4.5)
    assert packed.bits == opened.plan.bits(opened.manifest.shapes, 2)
    weights = sum(rows * columns for rows, columns in opened.manifest.shapes.values())
    gptq = size_of(made["gptq"])
    extra = 8 * sum(4 * columns for _, columns in opened.manifest.shapes.values())  # g_idx
    zeros = 4 / 32  # a zero of 4 bits for 32 weights
    assert gptq.format == "gptq"
    assert gptq.bits == pytest.approx(4 + 16 / 32 + zeros + extra / weights)
    tensors = size_of(made["compressed-tensors"])
    assert tensors.format == "compressed-tensors"
    assert 4.5 <= tensors.bits < 4.6  # and the shapes
    assert size_of(made["gguf"]) == ("gguf", made["gguf"].stat().st_size, 4.5)
    plain = size_of(tiny_model("llama", tmp_path))
    assert (plain.format, plain.bits) == ("float32", 32.0)
    conv = size_of(tiny_model("gpt2", tmp_path))  # biases do not count
    assert conv.bits == 32.0


def test_one_model_in_five_formats(made: dict[str, Path], exam: Exam) -> None:
    names = ("run", "gptq", "compressed-tensors", "gguf")
    found = compare([made[name] for name in names], exam, reference=made["original"])
    values = found.to_json()
    assert values["base"] == str(made["original"])
    first = values["models"][0]
    alone = assess(made["run"], reference=made["original"], exam=exam)
    for key in ("perplexity", "perplexity_interval", "kl", "difference_interval", "nlls"):
        assert first[key] == pytest.approx(alone[key], rel=1e-5), key
    assert first["kl"] > 0
    assert all(one["decode"] > 0 for one in values["models"])
    for one in values["models"][1:]:
        # the same codes; scales of fp16 instead of bf16, and other kernels
        assert one["kl"] == pytest.approx(first["kl"], rel=0.1), one["format"]
        assert one["perplexity"] == pytest.approx(first["perplexity"], rel=0.02), one["format"]


def test_without_a_reference(made: dict[str, Path], exam: Exam) -> None:
    found = compare([made["original"], made["run"]], exam)
    first, second = found.models
    assert first["difference"] is None
    moved = [a - b for a, b in zip(second["nlls"], first["nlls"], strict=True)]
    assert second["difference"] == pytest.approx(sum(moved) / len(moved))
    assert second["kl"] is None
    assert (found.measure, found.base) == ("perplexity", str(made["original"]))


def table(*points: tuple[int, float | None]) -> Compared:
    models: list[dict[str, Any]] = [
        {"model": str(number), "format": "x", "bpw": 4.0, "bytes": size, "kl": kl}
        | {"kl_interval": None if number else [kl, kl], "perplexity": 9.0}
        for number, (size, kl) in enumerate(points)
    ]
    return Compared("text", 24, "base", tuple(models))


def test_the_front() -> None:
    found = table((30, 0.1), (10, 0.5), (20, 0.6), (40, 0.1), (30, 0.09), (15, None))
    assert found.to_json()["front"] == ["1", "4"]
    assert table((40, 0.1), (30, 0.1)).front() == ["1"]  # as good and larger is not on it


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = table((30, 0.1), (10, 0.5), (15, None))
    path = tmp_path / "front.html"
    write_html(path, found.to_json(), found.measure)
    page = path.read_text("utf-8")
    assert "nats per token" in page
    assert len(page) > 1_000_000  # Plotly is in it
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ValueError, match="needs Plotly"):
        write_html(path, found.to_json(), found.measure)


def test_other_tokenizers_are_refused(made: dict[str, Path], exam: Exam, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path)
    with pytest.raises(ValueError, match="different tokenizers") as caught:
        compare([made["run"], other], exam)
    assert len(str(caught.value).splitlines()) == 3


def test_what_is_no_model(exam: Exam, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        compare([tmp_path / "none"], exam)


@pytest.mark.filterwarnings("ignore")
def test_the_command(made: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"{n}?", "choices": ["a cat", "a mat"], "label": n % 2} for n in range(6)]
    task = tmp_path / "cats.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--text", made["text"], "--windows", "3", "--length", "24", "--tasks", task]
    names = [made["original"], made["run"]]
    html = tmp_path / "front.html"
    done = run("compare", *names, *words, "--html", html)
    assert done.exit_code == 0, done.output
    for word in ("cats", "acc_norm", "perplexity", "no other is smaller"):
        assert word in done.stdout
    assert html.stat().st_size > 1_000_000
    done = run("compare", *names, *words, "--json")
    found = json.loads(done.stdout)
    assert [one["windows"] for one in found["models"]] == [3, 3]
    assert found["models"][1]["tasks"][0]["against"]["test"] == "McNemar"
    done = run("compare", tmp_path / "none", *words)
    assert done.exit_code == 2
    assert "there is no model to compare" in done.stderr
    done = run("eval", made["run"], "--against", made["original"], *words, "--limit", "4")
    assert done.exit_code == 0, done.output
    assert "4 items" in done.stdout
    assert "McNemar" in done.stdout
    assert "perplexity by tokens seen: 1: " in done.stdout
