"""Memory of a running model: the cache of the formula, work as it really is, limits that hold."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from aptq.core.grid import Grid
from aptq.core.plan import PartSpec, Plan, Target
from aptq.core.scores import Scores
from aptq.failures import Infeasible
from aptq.footprint import LIBRARY, SPARE, STEP, Fused, Ledger, running, weight_bytes, weight_limit
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.planning import choose
from aptq.recipe import Recipe
from aptq.runtime.load import load
from tests.tiny import tiny_model

RTN = "[[stage]]\nuse = 'rtn'\n"
CONTEXT, BATCH = 96, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def opened(name: str, folder: Path) -> Model:
    where = folder / name
    if not where.exists():
        tiny_model(name, folder, torch.bfloat16)
    return Model.open(where)


def uniform(model: Model, text: str = "int4-g16-z") -> Plan:
    return Plan.uniform(model.shapes, Grid.parse(text))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "phi3"])
def test_cache_is_that_of_the_formula(name: str, folder: Path) -> None:
    """2 x layers x KV heads x head size x 2 bytes x tokens; a sliding layer holds its window."""
    model = opened(name, folder)
    config = model.config.to_dict()
    heads = config.get("num_key_value_heads") or config.get("n_head") or 4
    tokens = 0
    kinds = config.get("layer_types") or ["full_attention"] * model.blocks
    if name == "mistral":
        kinds = ["sliding_attention"] * model.blocks
    for kind in kinds:
        # transformers keeps the window without the token that is being computed
        tokens += CONTEXT if kind == "full_attention" else config["sliding_window"] - 1
    expected = 2 * 2 * heads * 12 * tokens * BATCH
    assert running(model, uniform(model), CONTEXT, BATCH).cache == expected


def measured(model: PreTrainedModel) -> int:
    """Peak of what real tensors take besides the weights, cache and work together."""
    ledger = Ledger([*model.parameters(), *model.buffers()])
    with torch.no_grad(), Fused(), ledger:
        ids = torch.zeros(BATCH, CONTEXT - 1, dtype=torch.long)
        past = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        model(input_ids=ids[:, :1], past_key_values=past, use_cache=True, logits_to_keep=1)
    return ledger.peak


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "cohere2"])
def test_work_is_what_the_packed_model_really_allocates(
    name: str, folder: Path, tmp_path: Path
) -> None:
    model = opened(name, folder)
    plan = uniform(model, "int3-g16-z")
    compress(folder / name, tmp_path / "run", recipe=Recipe.parse(RTN, "x"), plan=plan)
    real = measured(load(tmp_path / "run"))
    predicted = running(model, plan, CONTEXT, BATCH)
    assert predicted.peak - predicted.weights - LIBRARY == pytest.approx(real, rel=0.05)


def test_weights_are_the_stored_tensors(folder: Path) -> None:
    model = opened("llama", folder)
    plan = uniform(model)
    stored = plan.nbytes(model.shapes) + 2 * (260 * 48 * 2 + 5 * 48)
    assert stored <= weight_bytes(model, plan) <= stored + STEP * 100
    assert running(model, plan, 64).weights == weight_bytes(model, plan)


def test_more_context_and_batch_take_more(folder: Path) -> None:
    model = opened("llama", folder)
    peaks = [running(model, uniform(model), *size).peak for size in ((64, 1), (96, 1), (96, 2))]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 3


@pytest.mark.parametrize("text", ["int2-g16-z", "int8-row", "bf16"])
def test_a_plan_within_the_limit_keeps_the_peak_below_the_device(text: str, folder: Path) -> None:
    """Whatever candidate the layers get, weights up to the limit leave room for all else."""
    model = opened("llama", folder)
    grids = [Grid.parse(grid) for grid in ("int2-g16-z", "int8-row", "bf16")]
    targets = [Target((PartSpec(grid),)) for grid in grids]
    device = 40_000_000
    limit = weight_limit(model, targets, device, CONTEXT, BATCH)
    found = running(model, uniform(model, text), CONTEXT, BATCH)
    assert found.cache + found.work <= (1 - SPARE) * device - limit
    assert limit < device - LIBRARY


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_what_cannot_be_computed_is_refused_by_name(name: str, folder: Path) -> None:
    model = opened(name, folder)
    with pytest.raises(ValueError, match=f"running '{name}' cannot be computed") as error:
        running(model, uniform(model), 64)
    assert len(str(error.value).splitlines()) == 3


def test_fits_is_planned_uniformly_and_by_scores(folder: Path) -> None:
    model = opened("llama", folder)
    names = ("int2-g16-z", "int3-g16-z", "int4-g16-z")
    targets = [Target((PartSpec(Grid.parse(name)),)) for name in names]
    three, four = (weight_bytes(model, uniform(model, name)) for name in names[1:])
    limit = weight_limit(model, targets, 40_000_000, 64, 1)
    taken = int(40_000_000 * (1 - SPARE)) - limit
    device = int((taken + (three + four) // 2) / (1 - SPARE)) + 1  # between the two
    text = f"grids = {list(names)}\nbudget = 'fits {device}B @ 64x1'\n" + RTN
    even = choose(model, Recipe.parse(text, "x"))
    assert even.grid == Grid.parse("int3-g16-z")
    rows = {name: (0.16 + i / 100, 0.04, 0.01) for i, name in enumerate(model.shapes)}
    scores = Scores("error", "nats", names, rows, dict.fromkeys(rows, (0.0, 0.0, 0.0)))
    text = "[allocate]\nuse = 'milp'\n" + RTN
    recipe = Recipe.parse(f"grids = {list(names)}\nbudget = 'fits {device}B @ 64'\n{text}", "x")
    mixed = choose(model, recipe, None, scores)
    assert three < weight_bytes(model, mixed.plan) <= (three + four) // 2 + 1
    assert running(model, mixed.plan, 64).peak <= device
    assert mixed.loss is not None
    with pytest.raises(Infeasible):
        choose(model, Recipe.parse(f"budget = 'fits 33MB @ 64'\n{RTN}", "x"))
