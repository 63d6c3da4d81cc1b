"""Errors that reconstruction leaves: equal to plain ones where there is none, else what it left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aptq.core.plan import Plan, Target
from aptq.core.scores import Scores
from aptq.effort import effort
from aptq.engine.block import Block
from aptq.engine.measure import Measure, Subject
from aptq.engine.stage import Stage, methods
from aptq.engine.walk import Progress, walk
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.pipeline import measure as measure_into
from aptq.planning import measuring_bytes
from aptq.recipe import Recipe
from aptq.store.headers import nbytes, read_specs
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model

TARGETS = tuple(map(Target.parse, ("int2-g16-z", "int4-g16-z", "bf16")))
RTN, GPTQ = methods.get("rtn")(), methods.get("gptq")()
TUNED = methods.get("efficientqat")(steps=20, weights=0.005, scales=0.01, zeros=0.01)
MEASURES: list[tuple[str, dict[str, Any]]] = [
    ("fisher", {"form": "token"}),
    ("fisher", {"form": "row"}),
    ("delta", {}),
    ("trace", {"weigh": "error"}),
    ("error", {}),
    ("kl", {}),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), torch.float32)


def subject(source: Path, work: Path, *stages: Stage) -> Subject:
    model, ids = Model.open(source), windows(8, 16)
    return Subject(model, ids, CPU, work, "memory", stages, TARGETS, frozenset(model.shapes))


def table(on: Subject, name: str, *, tuned: bool = True, **options: object) -> Scores:
    made = methods.get(name)(tuned=tuned, **options)
    assert isinstance(made, Measure)
    return made.run(on)


def test_stages_that_leave_a_rounded_layer_alone_cost_no_sweeps(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates are swept together, as for the quantizer alone, and give the same table."""
    gptq, later = methods.get("gptq")(), [methods.get(n)() for n in ("efficientqat", "e2e_qp")]
    alone = table(subject(llama, tmp_path, gptq), "error", tuned=False)

    def single(self: Stage, layer: object) -> object:
        raise AssertionError("a candidate was made by itself")

    monkeypatch.setattr(type(gptq), "on_layer", single)
    together = table(subject(llama, tmp_path, gptq, *later), "error", tuned=False)
    assert replace(together, record=alone.record) == alone


@pytest.mark.parametrize("stage", [RTN, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize(("name", "options"), MEASURES)
def test_equal_without_reconstruction(
    stage: Stage, name: str, options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    """rtn anywhere; gptq where the inputs are the same, in the first block of a forward measure."""
    on = subject(llama, tmp_path, stage)
    plain, found = (table(on, name, tuned=tuned, **options) for tuned in (False, True))
    assert found.losses.keys() == plain.losses.keys() == on.names
    assert "tuned=True" in found.record["options"]
    backward = type(methods.get(name)()).backward
    for layer, row in plain.losses.items():
        if stage is RTN or (layer.startswith("model.layers.0.") and not backward):
            assert found.losses[layer] == row, layer
            assert found.noise[layer] == plain.noise[layer]
        assert found.losses[layer][2] == row[2]  # 16 bits are not walked
    if stage is GPTQ:  # later blocks see what the first has lost
        assert found.losses != plain.losses


@pytest.mark.parametrize(("name", "options"), MEASURES)
def test_differs_behind_reconstruction(
    name: str, options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    on = subject(llama, tmp_path, TUNED)
    plain, found = (table(on, name, tuned=tuned, **options) for tuned in (False, True))
    rows = torch.tensor(list(found.losses.values()))
    assert rows.isfinite().all()
    for layer, row in plain.losses.items():
        assert found.losses[layer][:2] != row[:2], layer
    assert not list(tmp_path.iterdir())


def test_errors_are_those_that_lower_the_loss_of_the_block(llama: Path, tmp_path: Path) -> None:
    """W + dW, in the block as it was, gives outputs nearer to the original's than rounding does."""
    on, lost = subject(llama, tmp_path, TUNED), {}
    with on.walked() as ready:
        for which, errors in (("plain", on.errors), ("tuned", ready.errors)):
            stream = on.stream()
            block = on.block(0, stream)
            wanted = block.stream.twin()
            wanted.advance(0, block.module)
            for name, layer in block.layers.items():
                low, *_ = errors(layer)
                block.linears[name].weight.data = layer.weight + low
            stream.advance(0, block.module)
            lost[which] = float((stream.hidden - wanted.hidden).square().mean())
            on.model.unload(0)
    assert lost["tuned"] < 0.95 * lost["plain"], lost


def test_files_hold_what_compressing_makes(llama: Path, tmp_path: Path) -> None:
    """Of candidates below 16 bits, each once; as many bytes as planned; gone in the end."""
    seen: list[Progress] = []
    on = subject(llama, tmp_path, GPTQ, TUNED)
    on = replace(on, targets=(*TARGETS, TARGETS[0]), report=seen.append)
    made: dict[str, torch.Tensor] = {}

    def sink(block: Block) -> None:
        made.update({name: x.dense() - x.weight for name, x in block.layers.items()})

    walk(on.model, on.stream(), on.stages, on.plan(TARGETS[1]), sink=sink)
    with on.walked() as ready:
        files = list(tmp_path.iterdir())
        assert len(files) == 4
        found = sum(nbytes(spec) for file in files for spec in read_specs(file).values())
        assert found == sum(t.nbytes(s) for t in TARGETS[:2] for s in on.model.shapes.values())
        for index in range(2):
            for name, layer in ready.block(index, on.stream()).layers.items():
                one, other, dense, again = ready.errors(layer)
                assert torch.equal(other, made[name])
                assert torch.equal(one, again)
                assert not torch.equal(one, other)
                assert torch.equal(dense, layer.weight.bfloat16().float() - layer.weight)
            on.model.unload(index)
    assert [x.phase for x in seen] == ["candidate 1 of 2"] * 2 + ["candidate 2 of 2"] * 2
    assert not list(tmp_path.iterdir())


def test_files_are_gone_after_a_failure(llama: Path, tmp_path: Path) -> None:
    on = subject(llama, tmp_path, GPTQ)

    def fail(done: Progress) -> None:
        assert list(tmp_path.iterdir())
        raise RuntimeError(done.phase)

    with pytest.raises(RuntimeError, match="candidate 1 of 2"):
        table(replace(on, report=fail), "fisher")
    assert not list(tmp_path.iterdir())


def test_only_named_layers(llama: Path, tmp_path: Path) -> None:
    some = frozenset({"model.layers.1.mlp.down_proj"})
    on = replace(subject(llama, tmp_path, TUNED), names=some)
    assert table(on, "fisher", form="row").losses.keys() == some


@pytest.mark.parametrize(
    ("name", "options", "stage", "message"),
    [
        ("uniform", {}, RTN, "'uniform' has no use for tuned"),
        ("trace", {}, RTN, "'trace' has no use for tuned"),
        ("fisher", {}, methods.get("affinequant")(), "errors behind affinequant"),
        ("error", {}, methods.get("omniquant")(transform="scale"), "errors behind omniquant"),
    ],
)
def test_refused(
    name: str, options: dict[str, Any], stage: Stage, message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        table(subject(llama, tmp_path, GPTQ, stage), name, **options)
    assert len(str(caught.value).splitlines()) == 3


RECIPE = """
grids = ['int2-g16-z', 'int3-g16-z', 'int4-g16-z', 'bf16']
budget = '4bpw'
[data]
samples = 8
length = 16
source = '{text}'
[measure]
use = '{measure}'
tuned = true
[allocate]
use = 'milp'
[[stage]]
use = 'gptq'
rows = 'gradient'
[[stage]]
use = 'efficientqat'
steps = 4
"""


@pytest.mark.parametrize("name", ["fisher", "error"])
def test_from_recipe_to_checkpoint(name: str, llama: Path, tmp_path: Path) -> None:
    """Profiles come first, for the walks ask for them; the plan follows the scores."""
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    recipe = Recipe.parse(RECIPE.format(text=text, measure=name), "test")
    assert Recipe.parse(recipe.text(), "again") == recipe
    lines: list[str] = []

    def report(event: object) -> None:
        lines.append(str(event))

    scores = measure_into(llama, tmp_path / "scores.json", recipe=recipe, report=report)
    phases = [n for n, line in enumerate(lines) if "candidate 3 of 3" in line]
    assert next(n for n, line in enumerate(lines) if "phase='profile'" in line) < phases[0]
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt", "scores.json"}
    done = compress(llama, tmp_path / "run", recipe=recipe)
    assert done.bits <= 4
    again = Scores.load(tmp_path / "run" / "scores.json")
    assert again.losses == scores.losses
    assert not (tmp_path / "run" / "work").exists()


def test_needs_are_known_before(llama: Path, tmp_path: Path) -> None:
    """Time and disk of the walks; a recipe that folds is refused before the model is opened."""
    model = Model.outline(llama)
    recipe = Recipe.parse(RECIPE.format(text="words.txt", measure="fisher"), "test")
    assert recipe.measure is not None
    plain = replace(recipe, measure=replace(recipe.measure, tuned=False))
    plan = Plan.uniform(model.shapes, recipe.grids[0])
    more, less = (effort(model, x, plan, 0, CPU) for x in (recipe, plain))
    sizes = [
        Target.parse(str(grid)).nbytes(shape)
        for grid in recipe.grids[:-1]
        for shape in model.shapes.values()
    ]
    assert more.disk == less.disk + sum(sizes)
    assert more.seconds > 2 * less.seconds
    some = replace(recipe, keep=("*.down_proj",))
    needed = [measuring_bytes(model, x, True) for x in (recipe, some, plain)]
    assert needed == sorted(needed, reverse=True)
    assert len({*needed}) == 3
    assert measuring_bytes(model, recipe, False) == needed[2]
    folding = replace(recipe, stages=(GPTQ, methods.get("affinequant")()))
    with pytest.raises(ValueError, match="errors behind affinequant"):
        measure_into(tmp_path / "nowhere", tmp_path / "scores.json", recipe=folding)
