"""From recipe to plan and effort: engines' grids, coupling, minimum bits, what a run will take."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aptq.core.plan import Plan
from aptq.core.problem import code_bits
from aptq.core.scores import Scores
from aptq.effort import CANDIDATE, WAITING, _ahead, _measuring, effort
from aptq.engine.data import Data
from aptq.engine.stage import methods
from aptq.failures import Infeasible
from aptq.model.model import Model
from aptq.planning import (
    blank,
    candidates,
    choose,
    grids,
    kept_tokens,
    measuring_data,
    streams,
    wants_scores,
)
from aptq.recipe import Recipe
from aptq.terminal import Display
from aptq.work import Step
from tests.tiny import tiny_model

TABLES = "[allocate]\nuse = 'milp'\n[measure]\nuse = 'error'\n[[stage]]\nuse = 'gptq'\n"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(tiny_model("llama", tmp_path_factory.mktemp("m"), torch.bfloat16))


def recipe(head: str = "", tables: str = TABLES) -> Recipe:
    return Recipe.parse(head + tables, "here")


def table(model: Model, wanted: Recipe) -> Scores:
    """Losses that fall with the bits, and differ from layer to layer."""
    targets = candidates(wanted)
    rows = {
        name: tuple((1 + number % 7) * 4.0 ** -code_bits(target) for target in targets)
        for number, name in enumerate(model.shapes)
    }
    zeros = dict.fromkeys(rows, (0.0,) * len(targets))
    return Scores("error", "relative", tuple(map(str, targets)), rows, zeros)


@pytest.mark.parametrize(
    ("profile", "bits"), [("vllm", {4, 8, 16}), ("gguf", {2, 3, 4, 5, 6, 8, 16})]
)
def test_an_engine_limits_the_candidates(profile: str, bits: set[int]) -> None:
    assert {grid.bits for grid in grids(recipe(f"profile = '{profile}'\n"))} == bits
    some = recipe(f"profile = '{profile}'\ngrids = ['int2-g32', 'int8-g32']\n")
    assert [str(grid) for grid in grids(some)] == ["int8-g32"]
    with pytest.raises(ValueError, match=f"{profile} runs none of the candidate grids"):
        grids(recipe(f"profile = '{profile}'\ngrids = ['int3-g16']\n"))


def test_fused_layers_share_a_grid_where_the_engine_fuses_them(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aptq.planning.held_by", lambda *_: True)  # tiles are wider than the model
    shared = []
    for profile in ("vllm", "aptq"):
        head = f"profile = '{profile}'\nbudget = '7bpw'\ngrids = ['int4-g32', 'int8-g32']\n"
        wanted = recipe(head)
        plan = choose(model, wanted, None, table(model, wanted)).plan.targets
        groups = [[plan[n] for r, n in g.layers.items() if r in "qkv"] for g in model.groups(0)]
        shared.append(len(set(groups[0])) == 1)
    assert shared == [True, False]


def test_minimum_bits_hold(model: Model) -> None:
    head = "minimum = ['*.v_proj=6']\nbudget = '4.5bpw'\ngrids = ['int2-g32', 'int6-g32']\n"
    wanted = recipe(head)
    plan = choose(model, wanted, None, table(model, wanted)).plan.targets
    assert {code_bits(plan[name]) for name in plan if "v_proj" in name} == {6}
    assert 2 in {code_bits(target) for target in plan.values()}


def test_what_cannot_be_reached_is_known_before_measuring(model: Model) -> None:
    far = recipe("budget = '1bpw'\n")
    with pytest.raises(Infeasible):
        choose(model, far, None, blank(model, far))
    floor = recipe("budget = '0.1nats'\n")
    with pytest.raises(ValueError, match="no unit"):
        choose(model, floor, None, blank(model, floor))
    fitted = replace(floor, nats=True)
    assert choose(model, fitted, None, blank(model, fitted)).bits < 16


def test_measuring_looks_at_the_first_windows() -> None:
    assert measuring_data(Data()).samples == 32
    assert measuring_data(Data(samples=8)).samples == 8
    assert measuring_data(Data(length=32_768)).samples == 2


def test_scores_are_wanted_only_for_a_budget_to_spend(model: Model) -> None:
    plan = choose(model, recipe("budget = '4bpw'\n", "[[stage]]\nuse = 'rtn'\n")).plan
    assert wants_scores(recipe(), None)
    assert not wants_scores(recipe(), plan)
    assert not wants_scores(recipe().adapt(grid="int4-row"), None)
    assert not wants_scores(recipe().adapt(grid="int4-row", budget="5bpw"), None)
    assert not wants_scores(recipe("", "[[stage]]\nuse = 'rtn'\n"), None)


def test_effort_adds_up_what_the_recipe_does(model: Model, tmp_path: Path) -> None:
    wanted = recipe("", "[[stage]]\nuse = 'gptq'\n[data]\nsamples = 4\nlength = 64\n")
    choice = choose(model, wanted)

    def needs(chosen: Recipe, plan: Plan = choice.plan, device: torch.device = CPU):  # type: ignore[no-untyped-def]
        return effort(model, chosen, plan, choice.nbytes, device)

    found = needs(wanted)
    assert found.memory == sum(found.parts.values())
    assert found.disk == choice.nbytes + 4 * 64 * 48 * 2
    assert found.parts["statistics"] == 4 * (3 * 48**2 + 40**2)  # two inputs, o and down
    assert "program" not in needs(wanted, device=CUDA).parts
    kept = Plan({name: type(target)() for name, target in choice.plan.targets.items()})
    assert needs(wanted, kept).parts["factorisation"] == 0
    rtn = needs(recipe("", "[[stage]]\nuse = 'rtn'\n"))
    assert rtn.disk == choice.nbytes
    assert rtn.seconds < found.seconds < needs(recipe()).seconds
    longer = needs(wanted.adapt(samples=64))
    assert longer.seconds > found.seconds
    assert longer.disk > found.disk


def test_the_larger_of_two_walks_is_planned_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: candidates of a layer at once, or statistics, factor and states."""
    wanted = recipe()
    choice = choose(model, recipe("", "[[stage]]\nuse = 'rtn'\n"))

    def needs():  # type: ignore[no-untyped-def]
        return effort(model, wanted, choice.plan, choice.nbytes, CUDA)

    before = _measuring(model, wanted, choice.plan, CUDA, 1 << 10)
    numel = max(math.prod(shape) for shape in model.shapes.values())
    assert before["rounding"] == CANDIDATE * numel * len(candidates(wanted))
    assert before["hidden states"] == 1 << 10
    assert needs().memory >= sum(before.values()) - (1 << 10)
    monkeypatch.setattr("aptq.effort.measuring_bytes", lambda *_: 10**9)
    assert needs().memory == sum(before.values()) + 10**9 - (1 << 10)
    assert needs().host > 1 << 30
    assert effort(model, wanted, choice.plan, choice.nbytes, CPU).host == 0


def test_factors_of_experts_that_wait_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four experts of 48 and 40 columns, on a GPU alone; a model without experts has none."""
    wanted = recipe("", "[[stage]]\nuse = 'gptq'\n")
    moe = Model.open(tiny_model("mixtral", tmp_path, torch.bfloat16))
    plan = choose(moe, recipe("", "[[stage]]\nuse = 'rtn'\n")).plan
    monkeypatch.setattr("aptq.effort.batch_windows", lambda *_: 0)  # the same moment is the peak
    assert _ahead(moe, plan, CUDA) == 4 * 48**2
    assert _ahead(moe, plan, CPU) == 0

    def needed() -> int:
        parts = effort(moe, wanted, plan, 0, CUDA).parts
        return parts["factorisation"] + parts["rounding"]

    monkeypatch.setattr("aptq.effort.BATCH", 1000)
    assert needed() == 1000 * 4 * 48**2
    monkeypatch.setattr("aptq.effort.BATCH", 0)
    waiting = needed()
    monkeypatch.setattr("aptq.effort.FEWEST", 5)
    assert _ahead(moe, plan, CUDA) == 0
    assert waiting - needed() == WAITING * 4 * 48**2


def test_the_originals_stream_is_counted() -> None:
    """Drift needs the hidden states of the uncompressed model beside those at hand."""
    assert streams(Recipe.load("aptq")) == 2
    assert streams(Recipe.load("fast")) == 1


def test_what_tuning_takes_is_counted(model: Model) -> None:
    """Targets and copies of streams on the disk, latents in memory, steps in time."""
    stage, wide, whole = (
        "[[stage]]\nuse = 'efficientqat'\nsteps = 50\n",
        "blocks = 2\ntarget = 'both'\n",
        "[[stage]]\nuse = 'e2e_qp'\nweights = 0.001\n",
    )
    one, two, end = (recipe("", text) for text in (stage, stage + wide, stage + whole))
    assert [streams(x) for x in (one, two, end)] == [3, 6, 3]
    plan = choose(model, recipe("", "[[stage]]\nuse = 'rtn'\n"))
    found = [effort(model, x, plan.plan, plan.nbytes, CPU) for x in (one, two, end)]
    assert found[0].seconds < found[1].seconds
    assert found[0].seconds < found[2].seconds
    assert found[0].parts["tuning"] * 2 == found[1].parts["tuning"]
    assert found[2].parts["tuning"] > found[0].parts["tuning"]


def test_the_time_left_is_known_after_slow_blocks() -> None:
    """A block may take minutes; rich looks at the last 30 seconds unless told otherwise."""
    display, now = Display(quiet=True), [0.0]
    display.progress.disable, display.progress.get_time = False, lambda: now[0]
    for done in range(4):
        display(Step("compress", done, 30))
        now[0] += 50.0
    (task,) = display.progress.tasks
    assert task.time_remaining == 27 * 50


def test_states_of_written_windows_count_behind_the_walk() -> None:
    stages = (methods.get("gptq")(drift=0.25), methods.get("e2e_qp")())
    recipe = Recipe(stages=stages, data=Data(samples=4, length=16))
    inside = kept_tokens(recipe)
    assert inside == 3 * 64  # two streams, and the original's last states
    more = replace(recipe, data=Data(samples=4, length=16, written=3))
    assert kept_tokens(more) == 2 * 4 * 64
    few = replace(recipe, data=Data(samples=4, length=16, written=0), stages=stages[:1])
    assert kept_tokens(few) == 2 * 64
    with pytest.raises(ValueError, match="nothing would look at"):
        replace(more, stages=stages[:1])
