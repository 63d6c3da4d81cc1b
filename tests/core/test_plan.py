"""Plans: exact sizes, a closed text form, and refusals that name what is wrong."""

import json
from pathlib import Path

import pytest

from aptq.core.grid import Grid
from aptq.core.plan import PartSpec, Plan, Shapes, Target

SHAPES: Shapes = {
    f"model.layers.{block}.{name}": shape
    for block in range(2)
    for name, shape in {"self_attn.q_proj": (48, 40), "mlp.down_proj": (40, 90)}.items()
}
GRID = Grid("int4", 64, "int")


def test_uniform_sizes() -> None:
    plan = Plan.uniform(SHAPES, GRID)
    nbytes = sum(GRID.nbytes(shape) for shape in SHAPES.values())
    assert plan.nbytes(SHAPES) == nbytes
    assert plan.bits(SHAPES) == 8 * nbytes / (2 * (48 * 40 + 40 * 90))
    assert Plan.uniform(SHAPES, Grid("bf16")).bits(SHAPES) == 16


def test_kept_layers_count_at_their_own_width() -> None:
    plan = Plan.uniform(SHAPES, GRID, keep=["*.0.*", "*down_proj"])
    quantized = [name for name, target in plan.targets.items() if not target.kept]
    assert quantized == ["model.layers.1.self_attn.q_proj"]
    kept = 48 * 40 + 2 * 40 * 90
    assert plan.nbytes(SHAPES) == 2 * kept + GRID.nbytes((48, 40))
    assert plan.nbytes(SHAPES, itemsize=4) == 4 * kept + GRID.nbytes((48, 40))


def test_keep_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(ValueError, match="matches no layer") as caught:
        Plan.uniform(SHAPES, GRID, keep=["model.layers.7.mlp.down_proj"])
    assert "model.layers.0.mlp.down_proj" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_target_forms() -> None:
    double = Target((PartSpec(GRID), PartSpec(Grid("int2", 0))))
    assert str(double) == "int4-g64-z+int2-row"
    for target in (Target(), Target((PartSpec(GRID),)), double):
        assert Target.parse(str(target)) == target
    assert Target().kept
    assert Target().grid is None
    assert Target((PartSpec(GRID),)).grid == GRID
    assert double.grid is None
    assert double.nbytes((48, 40)) == GRID.nbytes((48, 40)) + Grid("int2", 0).nbytes((48, 40))


def test_text_form_is_compact_and_exact(tmp_path: Path) -> None:
    plan = Plan.uniform(SHAPES, GRID, keep=["*.0.*"])
    compact = plan.to_json()
    assert compact["grids"] == ["keep", "int4-g64-z"]
    assert list(compact["targets"].values()) == [0, 0, 1, 1]
    assert Plan.from_json(json.loads(json.dumps(compact))).targets == plan.targets
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "exactly the keys"),
        ({"version": 2}, "version 2"),
        ({"version": True}, "version is a bool"),
        ({"grids": ["int4-g64-z", "int99"]}, "int99"),
        ({"grids": [4]}, "not a text"),
        ({"grids": "keep"}, "grids is a str"),
        ({"targets": {"a": 2}}, "grid number 2 of 1"),
        ({"targets": {"a": -1}}, "grid number -1"),
        ({"targets": {"a": False}}, "grid number False"),
        ({"made_by": {"a": 1}}, "made_by"),
    ],
)
def test_broken_files_are_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    good = {"version": 1, "made_by": {}, "grids": ["keep"], "targets": {"a": 0}}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(good))
    assert Plan.load(path).targets == {"a": Target()}
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_files_that_are_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="not a plan"):
        Plan.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.json") as caught:
        Plan.load(tmp_path / "missing.json")
    assert len(str(caught.value).splitlines()) == 3


def test_check_finds_layers_too_many_and_too_few() -> None:
    plan = Plan.uniform(SHAPES, GRID)
    plan.check(SHAPES)
    with pytest.raises(ValueError, match="plan lacks layer 'other'"):
        plan.check({**SHAPES, "other": (1, 1)})
    few = dict(list(SHAPES.items())[1:])
    for call in (plan.check, plan.nbytes, plan.bits):
        with pytest.raises(ValueError, match=r"which the model lacks"):
            call(few)


OUTER: Shapes = {"model.embed_tokens": (260, 48), "lm_head": (260, 48)}


def test_layers_outside_the_blocks_may_be_named_and_never_count() -> None:
    inside = Plan.uniform(SHAPES, GRID, keep=["*.0.*"])
    double = Target((PartSpec(Grid("int2", 0)),))
    plan = Plan({**inside.targets, "lm_head": double, "model.embed_tokens": Target()})
    plan.check(SHAPES, OUTER)
    inside.check(SHAPES, OUTER)  # a plan without them keeps them
    assert plan.nbytes(SHAPES, 2, OUTER) == inside.nbytes(SHAPES, 2)
    assert plan.bits(SHAPES, 2, OUTER) == inside.bits(SHAPES, 2)
    assert plan.bits({**SHAPES, **OUTER}, 2, OUTER) == inside.bits(SHAPES, 2)
    assert plan.bits({**SHAPES, **OUTER}, 2) != inside.bits(SHAPES, 2)
    for call in (plan.check, plan.nbytes, plan.bits):
        with pytest.raises(ValueError, match=r"names layer 'lm_head', which the model lacks"):
            call(SHAPES)
    for call in (plan.nbytes, plan.bits):
        with pytest.raises(ValueError, match=r"names layer 'lm_head', which the model lacks"):
            call(SHAPES, 2, ["model.embed_tokens"])
    with pytest.raises(ValueError, match=r"plan lacks layer 'model\.layers\.0"):
        Plan({"lm_head": double}).check(SHAPES, OUTER)
    other = Plan({**inside.targets, "lm_heart": double})
    with pytest.raises(ValueError, match=r"(?s)names layer 'lm_heart'.*did you mean lm_head"):
        other.check(SHAPES, OUTER)
