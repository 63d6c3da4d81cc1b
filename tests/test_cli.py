"""The command line: options that stay, files that appear, exit codes, a line for each mistake."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner, Result

from aptq import failures
from aptq.cli import app, exit_code
from aptq.core.plan import Plan
from aptq.engine.stage import methods
from aptq.methods.quantize.gptq import GPTQ
from aptq.recipe import Recipe
from aptq.stats.hessian import Hessian
from tests.tiny import tiny_model

COMMON = {"--debug", "--help", "--json"}
EXAM = {
    *COMMON,
    "--against",
    "--data",
    "--device",
    "--length",
    "--limit",
    "--quiet",
    "--reference",
    "--seed",
    "--tasks",
    "--text",
    "--windows",
}
OPTIONS = {
    "bench run": {
        "--batches",
        "--debug",
        "--device",
        "--help",
        "--json",
        "--out",
        "--prompt",
        "--reference",
        "--revision",
        "--tokens",
        "--turns",
    },
    "bench compress": {
        "--budget",
        "--data",
        "--debug",
        "--device",
        "--grid",
        "--help",
        "--json",
        "--length",
        "--out",
        "--recipe",
        "--revision",
        "--samples",
    },
    "adapt": {
        *("--data", "--debug", "--device", "--grid", "--help", "--json", "--length", "--out"),
        *("--rank", "--revision", "--samples"),
    },
    "export": {"--debug", "--help", "--json", "--out", "--set", "--to"},
    "compress": {
        *COMMON,
        "--activations",
        "--allow-nonfinite",
        "--allow-partial",
        "--budget",
        "--data",
        "--device",
        "--grid",
        "--keep",
        "--length",
        "--out",
        "--plan",
        "--profile",
        "--quiet",
        "--recipe",
        "--resume",
        "--revision",
        "--samples",
        "--scores",
        "--seed",
        "--strict",
        "--verify",
    },
    "measure": {
        *COMMON,
        "--allow-partial",
        "--activations",
        "--data",
        "--device",
        "--keep",
        "--length",
        "--out",
        "--quiet",
        "--recipe",
        "--resume",
        "--revision",
        "--samples",
        "--seed",
    },
    "plan": {
        *COMMON,
        "--allow-partial",
        "--budget",
        "--context",
        "--device",
        "--grid",
        "--html",
        "--keep",
        "--out",
        "--profile",
        "--recipe",
        "--revision",
        "--scores",
    },
    "eval": {*EXAM, "--revision"},
    "compare": {*EXAM, "--html"},
    "generate": {
        *COMMON,
        "--compile",
        "--device",
        "--raw",
        "--revision",
        "--seed",
        "--temperature",
        "--tokens",
    },
    "info": {*COMMON, "--layers", "--verify"},
    "report": {*COMMON, "--compare", "--out"},
    "list": {*COMMON, "--markdown"},
    "verify": COMMON,
}
ROOT = Path(__file__).parents[1]
NAME = "model.safetensors"
SMALL = ["--samples", "2", "--length", "16"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def compressed(model: Path) -> Path:
    out = model.parent / "compressed"
    done = run("compress", model, "--grid", "int4-g16-z", "--out", out, "--recipe", "gptq", *SMALL)
    assert done.exit_code == 0, done.output
    return out


GRIDS = "grids = ['int2-g16-z', 'int3-g16-z', 'int4-g16-z', 'int6-g16-z', 'bf16']\n"
STAGE = "[[stage]]\nuse = 'gptq'\n[data]\nsamples = 4\nlength = 32\n"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe files that allocate: with a measure, and without one."""
    folder = tmp_path_factory.mktemp("recipes")
    allocate = "[allocate]\nuse = 'milp'\n"
    mixed, blind = folder / "mixed.toml", folder / "blind.toml"
    mixed.write_text(GRIDS + STAGE + allocate + "[measure]\nuse = 'fisher'\n")
    blind.write_text(GRIDS + STAGE + allocate)
    return {"MIXED": mixed, "BLIND": blind}


@pytest.fixture(scope="module")
def scores(model: Path, recipes: dict[str, Path]) -> Path:
    out = model.parent / "scores.json"
    done = run("measure", model, "--out", out, "--recipe", recipes["MIXED"], "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"out": str(out), "measure": "fisher", "unit": "nats"}
    return out


def test_options_are_frozen() -> None:
    commands = dict(get_command(app).commands)  # type: ignore[attr-defined]
    commands |= {f"bench {name}": each for name, each in commands.pop("bench").commands.items()}
    found = {
        name: {text for option in command.params for text in option.opts if text[0] == "-"}
        | {"--help"}
        for name, command in commands.items()
    }
    assert found == OPTIONS


def test_documents_name_real_options() -> None:
    known = {option for options in OPTIONS.values() for option in options}
    for name in ("README.md", "Makefile", "docs/design.md"):
        lines = (ROOT / name).read_text("utf-8").splitlines()
        used = [
            line.partition("aptq ")[2].split("#")[0].split() for line in lines if "aptq " in line
        ]
        for words in used:
            if words and words[0] in OPTIONS:
                assert {word for word in words if word[:2] == "--"} <= OPTIONS[words[0]], words
        assert set(re.findall(r"`(--[a-z]+)", "\n".join(lines))) <= known


def test_list_of_methods_is_up_to_date() -> None:
    """After a change of options: make docs."""
    assert (ROOT / "docs" / "methods.md").read_text("utf-8") == run("list", "--markdown").stdout


def test_every_command_explains_itself() -> None:
    for name in OPTIONS:
        done = run(*name.split(), "--help")
        assert done.exit_code == 0
        assert "Usage" in done.output


def test_version() -> None:
    assert run("--version").output.startswith("aptq ")


def test_compress_writes_a_run_folder(compressed: Path) -> None:
    names = {path.name for path in compressed.iterdir()}
    files = {"recipe.toml", "plan.json", "log.jsonl", "README.md", "identity.json"}
    assert names == {*files, "checkpoint"}
    assert not compressed.with_name(compressed.name + ".partial").exists()
    carried = {path.name for path in (compressed / "checkpoint").iterdir()}
    assert carried >= {"aptq.json", "config.json", "tokenizer.json", "generation_config.json"}
    events = [json.loads(line) for line in (compressed / "log.jsonl").read_text().splitlines()]
    assert events[0]["data"]["tokens_used"] == 32
    assert events[0]["bytes_predicted"] == events[-1]["bytes_after"]
    assert sum(event["event"] == "layer" for event in events) == 14


def test_recipe_and_plan_repeat_the_run(model: Path, compressed: Path, tmp_path: Path) -> None:
    words = ["--recipe", compressed / "recipe.toml", "--plan", compressed / "plan.json"]
    done = run("compress", model, "--out", tmp_path / "again", *words)
    assert done.exit_code == 0, done.output
    for file in (compressed / "checkpoint").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / "checkpoint" / file.name).read_bytes()


def test_budget_prints_both_figures(model: Path, tmp_path: Path) -> None:
    done = run("compress", model, "--budget", "5bpw", "--recipe", "rtn", "--out", tmp_path / "x")
    assert done.exit_code == 0, done.output
    assert "budget 5bpw: int4-g32-z, 4.8586 bpw" in done.output
    assert "none of the stages needs data" in done.output


def test_keep_leaves_layers_alone(model: Path, tmp_path: Path) -> None:
    words = ["--grid", "int4-row", "--recipe", "rtn", "--keep", "*.o_proj", "--keep", "*down_proj"]
    done = run("compress", model, "--out", tmp_path / "x", "--json", *words)
    assert done.exit_code == 0, done.output
    rows = {row["role"]: row for row in json.loads(done.stdout)["rows"]}
    assert [role for role, row in rows.items() if row["grid"] == "keep"] == ["o", "down"]
    assert rows["o"]["before"] == rows["o"]["after"]
    assert Recipe.load(tmp_path / "x" / "recipe.toml").keep == ("*.o_proj", "*down_proj")


def test_data_from_the_model_itself(model: Path, tmp_path: Path) -> None:
    words = ["--grid", "int4-row", "--data", "self", "--recipe", "gptq", "--json", *SMALL]
    done = run("compress", model, "--out", tmp_path / "x", *words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == 32


def test_eval_compares_and_remembers(model: Path, compressed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(compressed, tmp_path / "run")
    words = ["--reference", model, "--windows", "2", "--length", "32"]
    done = run("eval", copy, "--json", *words)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((copy / "eval.json").read_text())
    assert result["windows"] == 2
    assert result["kl"] > 0
    assert "Perplexity on builtin:pydoc" in (copy / "README.md").read_text()
    original = json.loads(run("eval", model, "--json", *words[2:]).stdout)
    assert original["perplexity"] == pytest.approx(result["reference"]["perplexity"])
    assert original["reference"] is None
    assert "perplexity" in run("eval", model, *words[2:]).output


def test_generate_is_deterministic(compressed: Path) -> None:
    words = ["generate", compressed, "Hello", "--tokens", "6", "--temperature", "1", "--json"]
    texts = [json.loads(run(*words, "--seed", seed).stdout)["text"] for seed in "001"]
    assert texts[0] == texts[1] != texts[2]
    assert run("generate", compressed, "Hello", "--tokens", "2", "--raw").exit_code == 0
    assert run("generate", compressed, "").exit_code == 2


def test_generate_says_why_it_cannot_compile(compressed: Path) -> None:
    done = run("generate", compressed, "Hello", "--compile", "--device", "cpu")
    assert done.exit_code == 2
    assert "steps cannot be compiled\nthe model is on cpu, not on a CUDA device\n" in done.output


def test_info_shows_what_is_stored(compressed: Path) -> None:
    found = json.loads(run("info", compressed, "--verify", "--json").stdout)
    assert found["nbytes"] == sum(f.stat().st_size for f in (compressed / "checkpoint").iterdir())
    assert len(found["layers"]) == 14
    assert all(layer["error"] > 0 for layer in found["layers"])
    bare = json.loads(run("info", compressed / "checkpoint", "--json").stdout)
    assert bare["run"] is None
    assert bare["bits"] == found["bits"]
    assert "down_proj" in run("info", compressed, "--layers").output
    assert "every hash is right" in run("info", compressed, "--verify").output
    parameters = found["parameters"]
    assert parameters == found["run"]["parameters"]
    assert parameters["compressed"] + parameters["kept"] + parameters["skipped"] == sum(
        tensor.numel() for tensor in load_file(compressed.parent / "llama" / NAME).values()
    )


def test_list_shows_methods() -> None:
    found = json.loads(run("list", "--json").stdout)
    assert {"gptq", "hqq", "milp", "rtn"} <= {entry["name"] for entry in found["methods"]}
    assert "aptq" in found["recipes"]
    assert "damp = 0.01" in run("list", "gptq").output
    assert "| damp | float | 0.01 |" in run("list", "--markdown").output
    assert "did you mean 'gptq'" in run("list", "gptqq").output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "how small the model shall become is not said"),
        (["--grid", "int4", "--recipe", "rtn"], 2, "not a grid"),
        (["--budget", "4 bits"], 2, "not a budget"),
        (["--budget", "0.5bpw"], 3, "no plan fits the budget 0.5bpw"),
        (["--grid", "int8-row", "--budget", "20kB"], 3, "no grid fits"),
        (["--grid", "int4-row", "--recipe", "apqt"], 2, "did you mean 'aptq'"),
        (["--grid", "int4-row", "--plan", "plan.json"], 2, "a plan leaves nothing to choose"),
        (["--keep", "*", "--plan", "plan.json"], 2, "a plan leaves nothing to choose"),
        (["--plan", "none.json"], 2, "No such file"),
        (["--grid", "int4-row", "--keep", "*.nothing"], 2, "matches no layer"),
        (["--grid", "int4-row", "--data", "none.txt"], 2, "does not exist"),
        (["--grid", "int4-row", "--samples", "0"], 2, "samples >= 1"),
        (["--grid", "int4-row", "--samples", "99999999", "--length", "16"], 2, "too short"),
        (["--grid", "int4-row", "--length", "512"], 2, "longer than the model allows"),
        (["--grid", "int4-row", "--device", "cuda:77"], 2, "no device 'cuda:77'"),
        (["--grid", "int4-row", "--device", "abacus"], 2, "no device 'abacus'"),
        (["--budget", "4bpw,0.5bpw"], 3, "no plan fits the budget 0.5bpw"),
        (["--budget", "4bpw,4bpw"], 2, "one budget twice"),
        (["--budget", "0.5nats", "--recipe", "rtn"], 2, "has no expected loss"),
        (["--budget", "fits 1kB @ 64"], 3, "no plan fits"),
        (["--grid", "int4-row", "--scores", "none.json"], 2, "not scores: none.json"),
        (["--grid", "int3-row", "--profile", "vllm"], 2, "vllm runs none of the candidate grids"),
        (["--budget", "1bpw", "--recipe", "MIXED"], 3, "1bpw"),
        (["--budget", "4bpw", "--recipe", "MIXED", "--keep", "*.x"], 2, "matches no layer"),
        (["--budget", "4bpw", "--recipe", "BLIND"], 2, "no [measure] table"),
    ],
)
def test_mistakes(
    model: Path, recipes: dict[str, Path], tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    done = run("compress", model, "--out", tmp_path / "x", *(recipes.get(w, w) for w in words))
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_output_folder_must_be_new(model: Path, tmp_path: Path) -> None:
    words = ["--grid", "int4-row", "--recipe", "rtn"]
    assert "output and input are the same" in run("compress", model, "--out", model, *words).output
    (tmp_path / "file").write_text("here")
    assert "is a file" in run("compress", model, "--out", tmp_path / "file", *words).output
    assert "is not empty" in run("compress", model, "--out", tmp_path, *words).output
    (tmp_path / "leer und ä").mkdir()
    done = run("compress", model, "--out", tmp_path / "leer und ä", *words)
    assert done.exit_code == 0, done.output


def test_damage_is_found(compressed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(compressed, tmp_path / "run")
    shard = copy / "checkpoint" / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run("info", copy).exit_code == 0
    assert run("info", copy, "--verify").exit_code == 6
    assert run("verify", copy).exit_code == 6
    shard.write_bytes(data[:-8])
    for words in (["info", copy], ["eval", copy], ["generate", copy, "x"]):
        assert run(*words).exit_code == 6
    assert run("info", tmp_path).exit_code == 2


def test_strict_refuses_rescues(model: Path, tmp_path: Path) -> None:
    """One token repeated gives a Hessian of rank one, which has no factor without damping."""
    recipe = tmp_path / "r.toml"
    recipe.write_text("[[stage]]\nuse = 'gptq'\ndamp = 0.0\n")
    (tmp_path / "a.txt").write_text("a" * 64)
    words = ["--grid", "int4-row", "--recipe", recipe, "--data", tmp_path / "a.txt", *SMALL]
    loose = run("compress", model, "--out", tmp_path / "loose", "--json", *words)
    assert loose.exit_code == 0, loose.output
    assert json.loads(loose.stdout)["fallbacks"] > 0
    strict = run("compress", model, "--out", tmp_path / "strict", "--strict", *words)
    assert (strict.exit_code, "numerical rescue" in strict.output) == (5, True)
    assert not (tmp_path / "strict").exists()
    assert not (tmp_path / "strict.partial").exists()


def test_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    words = ["--grid", "int4-row", "--recipe", "rtn", "--out", tmp_path / "x"]
    done = run("compress", model, *words)
    assert (done.exit_code, "1,000 free" in done.output) == (4, True), done.output
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_exception(model: Path, tmp_path: Path) -> None:
    done = run("compress", model, "--out", tmp_path / "x", "--grid", "int9", "--debug")
    assert isinstance(done.exception, ValueError)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 2),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), 2),
        (failures.Infeasible(), 3),
        (failures.Shortage(), 4),
        (MemoryError(), 4),
        (torch.OutOfMemoryError(), 4),
        (OSError(errno.ENOSPC, "full"), 4),
        (failures.Unsound(), 5),
        (failures.Corrupt(), 6),
        (KeyboardInterrupt(), 130),
        (AssertionError(), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_a_defect_names_its_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("aptq.pipeline.choose", broken)
    done = run("compress", model, "--out", tmp_path / "x", "--grid", "int4-row", "--recipe", "rtn")
    assert done.exit_code == 1
    assert "unexpected KeyError" in done.output
    assert "at test_cli.py, line" in done.output
    assert list(tmp_path.iterdir()) == []


def test_measure_refuses_what_it_cannot_write(
    model: Path, scores: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    again = run("measure", model, "--out", scores, "--recipe", recipes["MIXED"])
    assert (again.exit_code, "it exists" in again.output) == (2, True), again.output
    nowhere = run("measure", model, "--out", tmp_path / "no" / "s.json")
    assert "there is no such folder" in nowhere.output
    none = run("measure", model, "--out", tmp_path / "s.json", "--recipe", "gptq")
    assert "no [measure] table" in none.output
    assert list(tmp_path.iterdir()) == []


def test_several_budgets_are_measured_once(
    model: Path, scores: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--recipe", recipes["MIXED"], "--budget", "3.5bpw, 135kB,fits 40MB @ 64x2", "--json"]
    done = run("compress", model, "--out", tmp_path / "x", *words)
    assert done.exit_code == 0, done.output
    names = ["3.5bpw", "135kB", "fits-40MB-64x2"]
    assert {path.name for path in (tmp_path / "x").iterdir()} == set(names)
    found = json.loads(done.stdout)
    assert [Path(one["out"]).name for one in found] == names
    bits, held, fits = found
    assert bits["bits"] <= 3.5
    files = (tmp_path / "x" / "135kB" / "checkpoint").iterdir()
    assert sum(file.stat().st_size for file in files) <= 135_000
    assert fits["bits"] == 16
    assert bits["expected_loss"][0] > held["expected_loss"][0] > fits["expected_loss"][0]
    tables = [(tmp_path / "x" / name / "scores.json").read_bytes() for name in names]
    assert tables == [scores.read_bytes()] * 3
    recipe = Recipe.load(tmp_path / "x" / "135kB" / "recipe.toml")
    assert recipe.budget == "135kB"
    card = (tmp_path / "x" / "3.5bpw" / "README.md").read_text("utf-8")
    assert "rule milp, measure fisher, budget 3.5bpw" in card
    assert "Expected loss" in card


def test_scores_replace_measuring(
    model: Path, scores: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--recipe", recipes["MIXED"], "--budget", "3.5bpw"]
    plan = tmp_path / "plan.json"
    looked = run("plan", model, *words, "--scores", scores, "--out", plan)
    assert looked.exit_code == 0, looked.output
    done = run("compress", model, "--out", tmp_path / "x", *words, "--scores", scores)
    assert done.exit_code == 0, done.output
    assert "measure" not in done.output.split("calibration")[1].split("plan:")[0]
    assert "expected loss" in done.output
    assert Plan.load(tmp_path / "x" / "plan.json") == Plan.load(plan)
    assert len(set(map(str, Plan.load(plan).targets.values()))) > 1


@dataclass(frozen=True, kw_only=True)
class Weighted(GPTQ):
    """GPTQ whose rows are weighted by their gradients."""

    def needs(self) -> tuple[Hessian, ...]:
        return (Hessian(rows="gradient"),)


def test_gradient_weights_are_measured_where_a_stage_asks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a measure the profiles come from a walk of their own, with one from the scores."""
    monkeypatch.setitem(methods._classes, "weighted", Weighted)
    recipe = tmp_path / "r.toml"
    stage = "[[stage]]\nuse = 'weighted'\n"
    recipe.write_text(stage)
    words = ["--grid", "int3-row", "--recipe", recipe, *SMALL]
    done = run("compress", model, "--out", tmp_path / "x", *words)
    assert done.exit_code == 0, done.output
    tables = "[allocate]\nuse = 'milp'\n[measure]\nuse = 'error'\n"
    recipe.write_text(GRIDS + tables + stage)
    words = ["--budget", "4bpw", "--recipe", recipe, *SMALL]
    done = run("compress", model, "--out", tmp_path / "y", *words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "y" / "scores.json").read_text())["profiles"]
    assert "expected loss" not in done.output  # error only orders


def test_plan_needs_no_weights(model: Path, scores: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    words = ["--budget", "4bpw, 5bpw", "--context", "64", "--json"]
    found = json.loads(run("plan", bare, *words).stdout)
    full = json.loads(run("plan", model, *words).stdout)
    files = [f for f in model.iterdir() if f.suffix != ".safetensors" and f.name != "config.json"]
    carried = sum(f.stat().st_size for f in files)
    for one, other in zip(found["budgets"], full["budgets"], strict=True):
        assert one["bits"] == other["bits"]
        assert 0 < other["nbytes"] - one["nbytes"] - carried < 2000  # their names in the manifest
    first = found["budgets"][0]
    assert first["grids"] == {"int3-g32-z": 14}
    assert set(first["kept"]) == {"model.embed_tokens", "lm_head"}
    assert first["running"]["peak"] == sum(
        first["running"][k] for k in ("weights", "cache", "work")
    )
    assert first["compressing"]["disk"] > first["nbytes"]
    losses = [point["loss"] for point in found["front"]]
    assert losses == sorted(losses, reverse=True)
    done = run("compress", bare, "--out", tmp_path / "x", "--grid", "int4-row")
    assert (done.exit_code, "the folder holds no weights" in done.output) == (2, True)
    assert run("plan", bare, "--budget", "4bpw,5bpw", "--out", tmp_path / "p.json").exit_code == 2


def test_plan_shows_what_stays_and_why(model: Path, scores: Path, recipes: dict[str, Path]) -> None:
    words = ["--budget", "6bpw", "--recipe", recipes["MIXED"], "--keep", "*.0.mlp.down_proj"]
    done = run("plan", model, *words, "--scores", scores)
    assert done.exit_code == 0, done.output
    for text in ("16 bit: 1 layers", "keep pattern '*.0.mlp.down_proj'", "nats per token", "•"):
        assert text in done.output
    blind = run("plan", model, *words).output
    assert "no scores: plans are uniform here" in blind
    needs = [
        json.loads(run("plan", model, *words, "--json", *more).stdout)["budgets"][0]["compressing"]
        for more in ([], ["--scores", scores])
    ]
    assert needs[0]["seconds"] > needs[1]["seconds"]  # without scores they will be measured
    assert "expected loss" not in blind


def test_plan_of_a_family_whose_memory_is_unknown(tmp_path: Path) -> None:
    done = run("plan", tiny_model("mixtral", tmp_path), "--budget", "4bpw")
    assert done.exit_code == 0, done.output
    assert "the memory of a running 'mixtral' cannot be computed" in done.output


def test_picture_is_one_file_that_needs_nothing(
    model: Path, scores: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "front.html"
    words = ["--budget", "4bpw", "--recipe", recipes["MIXED"], "--scores", scores, "--html", out]
    assert run("plan", model, *words).exit_code == 0
    text = out.read_text("utf-8")
    assert "plotly.js" in text
    assert not re.search(r"<script[^>]+src=", text)
    assert "nats per token" in text


def test_picture_without_plotly_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    done = run("plan", model, "--budget", "4bpw", "--html", tmp_path / "x.html")
    assert (done.exit_code, "pip install 'aptq[plotly]'" in done.output) == (2, True), done.output
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
def test_plan_of_a_70b_model_takes_seconds_and_little_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    more = {"model_type": "llama", "dtype": "bfloat16", "max_position_embeddings": 8192}
    config = {**more, **sizes, **heads, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import resource, sys; sys.argv = ['aptq', 'plan', sys.argv[1], '--budget', '4bpw'];"
        "from aptq.cli import app; app(standalone_mode=False);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    began = time.perf_counter()
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 30
    assert int(done.stdout.splitlines()[-1]) < 1 << 30
