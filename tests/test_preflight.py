"""What is found in seconds before a run: weights, plans, needs, versions; and what verify reads."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aptq.core.plan import Plan, Target
from aptq.core.reading import parse_json, printable, read_bytes, strays
from aptq.engine.siblings import lent
from aptq.failures import Corrupt, Infeasible, Shortage, Unsound
from aptq.model.model import Model
from aptq.planning import ragged
from aptq.preflight import NOTHING, Allow, check_needs, nonfinite, preflight
from aptq.recipe import Recipe
from aptq.store.checkpoint import Checkpoint
from aptq.store.verify import account, verify
from aptq.versions import SUPPORTED, check_versions
from tests.store.packed import Packed, pack
from tests.tiny import TINY, tiny_model

GRID = "grids = ['int4-g32-z']\nbudget = ''\n[[stage]]\nuse = 'rtn'\n"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("packed")
    return pack(tiny_model("qwen2", folder, torch.bfloat16), folder / "out", "mixed")


def poison(folder: Path, name: str, value: float = torch.nan) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3:5] = value
    save_file(tensors, file, metadata={"format": "pt"})


def told(model: Model, recipe: Recipe, plan: Plan | None, allow: Allow) -> tuple[object, ...]:
    lines: list[str] = []
    found = preflight(model, recipe, plan, None, allow, lambda line: lines.append(str(line)))
    return (*found, lines)


def test_weights_that_are_not_finite_are_named_with_counts(llama: Path) -> None:
    poison(llama, "model.layers.1.mlp.up_proj.weight")
    poison(llama, "model.norm.weight", torch.inf)
    with pytest.raises(ValueError, match="2 weights are not finite") as caught:
        nonfinite(Model.open(llama), NOTHING)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert "model.layers.1.mlp.up_proj.weight: 2 of 1,920" in text
    assert "model.norm.weight: 2 of 48" in text


def test_a_dtype_too_narrow_is_noticed(llama: Path) -> None:
    poison(llama, "model.layers.1.mlp.up_proj.weight", 1e6)
    assert nonfinite(Model.open(llama), NOTHING) == []
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        nonfinite(Model.open(llama, dtype=torch.float16), NOTHING)


@pytest.mark.parametrize(
    ("family", "name", "layers"),
    [
        ("llama", "layers.1.mlp.up_proj.weight", ["layers.1.mlp.up_proj"]),
        ("llama", "embed_tokens.weight", []),
        (
            "phi3",
            "layers.0.self_attn.qkv_proj.weight",
            [f"layers.0.self_attn.qkv_proj.{role}" for role in "qkv"],
        ),
    ],
)
def test_what_is_not_finite_is_kept(
    family: str, name: str, layers: list[str], tmp_path: Path
) -> None:
    folder = tiny_model(family, tmp_path)
    poison(folder, f"model.{name}")
    model, recipe = Model.open(folder), Recipe.parse(GRID, "test")
    kept = [f"model.{layer}" for layer in layers]
    changed, none, choices, lines = told(model, recipe, None, Allow(nonfinite=True))
    assert isinstance(changed, Recipe)
    assert none is None
    assert list(changed.keep) == kept
    plan = choices[0].plan  # type: ignore[index]
    assert [layer for layer, target in plan.targets.items() if target.kept] == kept
    assert any(f"model.{name}" in line for line in lines)  # type: ignore[union-attr]
    model.load_outer()
    model.load(0)
    model.load(1)
    model = Model.open(folder)
    given = Plan.uniform(model.shapes, recipe.grids[0])
    _, plan, *_ = told(model, recipe, given, Allow(nonfinite=True))
    assert isinstance(plan, Plan)
    assert [layer for layer, target in plan.targets.items() if target.kept] == kept


def test_notes(llama: Path) -> None:
    model = Model.open(llama)
    recipe = Recipe.parse(GRID.replace("rtn", "gptq") + "[data]\nsamples = 1\nlength = 8\n", "test")
    *_, lines = told(model, recipe, None, NOTHING)
    assert any("14 layers have a smaller last group" in line for line in lines)  # type: ignore[union-attr]
    assert any("fewer tokens than columns (8 < 48)" in line for line in lines)  # type: ignore[union-attr]
    whole = Recipe.parse(GRID.replace("''", "'99bpw'").replace("int4-g32-z", "bf16"), "test")
    *_, lines = told(model, whole, None, NOTHING)
    assert any("99bpw is above what the model takes" in line for line in lines)  # type: ignore[union-attr]
    assert ragged(Plan.uniform(model.shapes, Target.parse("int4-g8").grid), model.shapes) == []  # type: ignore[arg-type]


def test_needs_beyond_the_machine(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = Model.open(llama), Recipe.parse(GRID, "test")
    _, _, choices, _ = told(model, recipe, None, NOTHING)
    reserved: list[int] = []
    how = (torch.device("cpu"), lambda _: None)
    check_needs(model, recipe, choices, reserved.append, *how)  # type: ignore[arg-type]
    assert reserved == [choices[0].nbytes]  # type: ignore[index]
    small = type("Memory", (), {"total": 1000, "available": 1000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: small)
    with pytest.raises(Shortage, match="memory of cpu is too small"):
        check_needs(model, recipe, choices, reserved.append, *how)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [name for name in TINY if name not in ("gemma3n", "gpt_oss")])
def test_every_parameter_has_an_account(family: str, tmp_path: Path) -> None:
    made = pack(tiny_model(family, tmp_path, torch.bfloat16), tmp_path / "out", "mixed")
    found = account(Checkpoint.open(made.folder))
    assert found.total == made.model.coverage.total
    assert found.compressed > found.kept > 0
    assert found.skipped > 0


def test_parameters_too_few(packed: Packed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed.folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 261}))
    with pytest.raises(Corrupt, match="parameters of the model are missing"):
        account(Checkpoint.open(folder))


def forged(packed: Packed, folder: Path, name: str, value: float) -> Path:
    """A copy in which a stored tensor has another value, and aptq.json the right hash."""
    from aptq.store.headers import hash_file

    copy = Path(shutil.copytree(packed.folder, folder))
    shard = copy / Checkpoint.open(copy).where[name]
    tensors = load_file(shard)
    tensors[name].view(-1)[0] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    manifest = json.loads((copy / "aptq.json").read_text())
    manifest["files"][shard.name] = hash_file(shard)
    (copy / "aptq.json").write_text(json.dumps(manifest))
    return copy


def test_verify_reads_values(packed: Packed, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(packed.folder)
    found = verify(checkpoint)
    assert found.tensors == len(checkpoint.specs)
    assert found.nonfinite == {}
    scale = next(name for name in checkpoint.specs if name.endswith(".scale"))
    with pytest.raises(Corrupt, match=r"not finite[^|]*1 of"):
        verify(Checkpoint.open(forged(packed, tmp_path / "a", scale, torch.inf)))
    kept = Checkpoint.open(forged(packed, tmp_path / "b", "model.norm.weight", torch.nan))
    assert verify(kept).nonfinite == {"model.norm.weight": 1}


def test_links_out_of_a_folder(packed: Packed, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed.folder, tmp_path / "copy"))
    (copy / "config.json").rename(tmp_path / "elsewhere")
    (copy / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="leads out of its folder"):
        Checkpoint.open(copy)


def test_links_of_a_hub_cache_are_none(tmp_path: Path) -> None:
    blobs, home = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    tiny_model("llama", tmp_path)
    shutil.move(tmp_path / "llama", home)
    for path in list(home.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert Model.open(home).blocks == 2
    (home / "config.json").unlink()
    (home / "config.json").symlink_to(tmp_path / "other.json")
    (tmp_path / "other.json").write_bytes((blobs / "config.json").read_bytes())
    assert strays(home, home.iterdir()) == [home / "config.json"]
    with pytest.raises(ValueError, match="leads out of its folder"):
        Model.open(home)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"experts_implementation": "someone/kernel"},
        {"attn_implementation": {"": "someone/kernel"}},
    ],
)
def test_kernels_named_in_a_config_are_not_fetched(
    llama: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_utils as library

    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(library, "load_and_register_attn_kernel", fetched, raising=False)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, **changes}))
    assert Model.open(llama).skeleton.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 5000), ("hidden_size", 1 << 60), ("num_local_experts", 1 << 20)],
)
def test_sizes_that_no_model_has(llama: Path, key: str, value: int) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"does not describe a model[^|]*{key} = {value}"):
        Model.open(llama)


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="11 bytes, 10 allowed"):
        read_bytes(file, 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(ValueError, match="objects and lists"):
        parse_json(b"[" + b"[]," * (1 << 21) + b"[]]")
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert printable("y" * 300) == "y" * 200 + "..."


def test_idle_experts_get_their_siblings_scores() -> None:
    path = "model.layers.0.mlp.experts.{}.up_proj"
    table = {path.format(0): (1.0, 2.0), path.format(1): (0.0, 0.0), path.format(2): (3.0, 4.0)}
    other = {"model.layers.0.mlp.experts.1.down_proj": (0.0, 0.0), "model.q_proj": (0.0, 0.0)}
    found = lent(table | other)
    assert found[path.format(1)] == (2.0, 3.0)
    assert {name: found[name] for name in other} == other
    assert found[path.format(0)] == (1.0, 2.0)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    check_versions()
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    for name, (least, _) in SUPPORTED.items():
        assert f'"{name}>={".".join(map(str, least))}' in text
    monkeypatch.setattr("aptq.versions.version", lambda _: "2.10.1")
    with pytest.raises(ValueError, match=r"2\.10\.1 is installed, torch>=2\.11,<3 needed"):
        check_versions()


def test_a_layer_that_does_not_become_finite_stops_the_run(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from aptq import pipeline
    from aptq.engine.layer import Layer

    monkeypatch.setattr(Layer, "error", lambda _: torch.nan)
    with pytest.raises(Unsound, match=r"finite weights\nmodel[^|]*--keep 'model\.layers\.0"):
        pipeline.compress(llama, tmp_path / "out", recipe=Recipe.parse(GRID, "test"))
    assert not (tmp_path / "out").exists()


def test_blocks_of_unknown_linears_need_a_word(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aptq.model.layout._UNCOVERED", -1.0)
    with pytest.raises(Infeasible, match="add --allow-partial"):
        Model.open(llama)
    with pytest.raises(Infeasible, match="add --allow-partial"):
        Model.outline(llama)
    assert Model.open(llama, partial=True).blocks == Model.outline(llama, partial=True).blocks
