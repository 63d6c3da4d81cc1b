"""`aptq-parts`: what it shares with the default, that its sums are chosen and run, and that its
further stages leave plans without sums alone."""

import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aptq.cli import app
from aptq.core.plan import Plan, Target
from aptq.engine.data import Data
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.recipe import Recipe
from aptq.runtime.load import dense, load
from tests.engine.run import windows
from tests.tiny import tiny_model


def table(name: str) -> dict[str, Any]:
    text = (resources.files("aptq") / "recipes" / f"{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five weights of each linear stand out so far that a grid for them leaves the others none."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("shipped"), torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "_proj" in name:
            weight.view(-1)[:: weight.numel() // 5 + 1] = 4.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    path = model.parent / "words.txt"
    path.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    return path


def test_it_is_the_default_with_more_candidates() -> None:
    parts, default = table("aptq-parts"), table("aptq")
    assert parts["grids"][: len(default["grids"])] == default["grids"]
    assert parts["stage"][1:2] == default["stage"]
    same = ("measure", "allocate")
    assert {key: parts[key] for key in same} == {key: default[key] for key in same}
    more = [Target.parse(text) for text in parts["grids"][len(default["grids"]) :]]
    assert all(len(target.parts) == 2 for target in more)
    assert {target.parts[1].kind for target in more} == {"sparse", "lowrank"}


def test_sums_are_chosen_and_run(model: Path, text: Path, tmp_path: Path) -> None:
    words = ["compress", str(model), "--recipe", "aptq-parts", "--budget", "2.5bpw"]
    words += ["--data", str(text), "--samples", "4", "--length", "16"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.bits(Model.outline(model).shapes) <= 2.5
    kinds = {part.kind for target in plan.targets.values() for part in target.parts}
    assert "sparse" in kinds
    packed, whole = (make(tmp_path / "run", dtype=torch.float32) for make in (load, dense))
    ids = windows(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_plan_without_sums_gives_the_bytes_of_the_default(
    model: Path, text: Path, tmp_path: Path
) -> None:
    plan = Plan(dict.fromkeys(Model.outline(model).shapes, Target.parse("int3-g16-z")))
    made = []
    for name in ("aptq", "aptq-parts"):
        data = Data(source=str(text), samples=4, length=16)
        recipe = replace(Recipe.load(name), budget="", data=data)
        compress(model, tmp_path / name, recipe=recipe, plan=plan)
        files = sorted((tmp_path / name / "checkpoint").glob("*.safetensors"))
        made.append({file.name: file.read_bytes() for file in files})
    assert made[0] == made[1]
    assert made[0]
