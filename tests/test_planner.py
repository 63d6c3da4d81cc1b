"""Planner: never above the budget, the best of what fits, clear when nothing does."""

import dataclasses
import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from aptq.allocate import allocators
from aptq.allocate.milp import Milp
from aptq.allocate.threshold import Threshold
from aptq.core.budget import Budget
from aptq.core.expected import expected_error
from aptq.core.grid import Grid
from aptq.core.plan import PartSpec, Plan, Shapes, Target
from aptq.core.problem import Option, significant
from aptq.core.scores import Scores
from aptq.core.search import Room
from aptq.core.units import Wishes, coupled
from aptq.failures import Infeasible
from aptq.model.model import Model
from aptq.planner import CANDIDATES, Choice, Planner, uniform
from aptq.store.predict import predict
from tests.tiny import tiny_model

SHAPES: Shapes = {"a.q_proj": (48, 576), "a.down_proj": (576, 1536), "b.q_proj": (48, 576)}
OUTER = 10_000


def choose(budget: str, grids: tuple[Grid, ...] = (), keep: tuple[str, ...] = ()) -> Choice:
    return uniform(SHAPES, grids, budget, keep=keep, size=lambda plan: OUTER + plan.nbytes(SHAPES))


@pytest.mark.parametrize("bits", [2.02, 2.5, 3.0, 3.5, 4.0, 4.3125, 5.1, 8.0, 8.7])
def test_budget_in_bits_is_kept_and_used(bits: float) -> None:
    choice = choose(f"{bits}bpw")
    assert choice.bits <= bits
    assert choice.bits == Plan.uniform(SHAPES, choice.grid).bits(SHAPES)
    better = [
        g for g in CANDIDATES if expected_error(g, SHAPES) < expected_error(choice.grid, SHAPES)
    ]
    assert all(Plan.uniform(SHAPES, grid).bits(SHAPES) > bits for grid in better)


def test_budget_in_bytes_counts_the_whole_checkpoint() -> None:
    exact = choose("4.3125bpw")
    assert choose(f"{exact.nbytes / 1000}kB").nbytes <= exact.nbytes
    less = choose(f"{(exact.nbytes - 1) / 1000}kB")
    assert less.nbytes < exact.nbytes


def test_more_budget_is_never_worse() -> None:
    chosen = [choose(f"{bits / 10}bpw") for bits in range(21, 90)]
    errors = [expected_error(one.grid, SHAPES) for one in chosen]
    assert all(before >= after for before, after in pairwise(errors))


def test_above_everything_nothing_is_lost() -> None:
    assert choose("20bpw").grid == Grid("bf16")


def test_infeasible_tells_what_could_be_reached() -> None:
    with pytest.raises(Infeasible, match=r"int2-row-z: 2\.") as error:
        choose("0.5bpw")
    assert len(str(error.value).splitlines()) == 3


def test_kept_layers_count_at_full_width() -> None:
    with pytest.raises(Infeasible):
        choose("4bpw", keep=("*.down_proj",))
    kept = choose("15.5bpw", keep=("*.down_proj",))
    assert kept.plan.targets["a.down_proj"].kept


def test_one_grid_without_a_budget_is_taken() -> None:
    grid = Grid.parse("int3-g128")
    assert choose("", (grid,)).grid == grid
    with pytest.raises(ValueError, match="neither a grid nor a budget"):
        choose("", CANDIDATES)


def test_grid_and_budget_must_agree() -> None:
    grid = Grid.parse("int4-g64-z")
    assert choose("5bpw", (grid,)).grid == grid
    with pytest.raises(Infeasible):
        choose("4bpw", (grid,))


def test_expected_error_follows_bits_and_groups() -> None:
    def error(text: str) -> float:
        return expected_error(Grid.parse(text), SHAPES)

    assert error("int4-g64-z") < error("int3-g64-z")
    assert error("int4-g32-z") < error("int4-g128-z") < error("int4-row-z")
    assert error("int4-g64-z") < error("int4-g64")  # a zero uses the range of skewed groups
    assert error("bf16") == 0


GRIDS = CANDIDATES[::2]  # with bf16
TARGETS = tuple(Target((PartSpec(grid),)) for grid in GRIDS)
MODEL: Shapes = {
    f"model.layers.{block}.{name}": shape
    for block in range(4)
    for name, shape in {
        "self_attn.q_proj": (96, 96),
        "self_attn.k_proj": (48, 96),
        "self_attn.v_proj": (48, 96),
        "self_attn.o_proj": (96, 96),
        "mlp.gate_proj": (200, 96),
        "mlp.up_proj": (200, 96),
        "mlp.down_proj": (96, 200),
    }.items()
}
HEAD: Shapes = {"model.embed_tokens": (500, 96)}
WEIGHTS = sum(rows * columns for rows, columns in MODEL.values())


def made_up(shapes: Shapes, seed: int = 0, targets: tuple[Target, ...] = TARGETS) -> Scores:
    """a 4^-bits with a random sensitivity for each layer."""
    rng = random.Random(seed)
    losses = {}
    for name, shape in shapes.items():
        weights = shape[0] * shape[1]
        a = weights / 1e5 * 10 ** rng.uniform(-1, 1)
        row = []
        for target in targets:
            full = target.grid is not None and target.grid.dense
            row.append(0.0 if full else a * 4 ** -(8 * target.nbytes(shape) / weights))
        losses[name] = tuple(row)
    noise = {name: tuple(0.01 * loss for loss in row) for name, row in losses.items()}
    return Scores("made up", "nats", tuple(map(str, targets)), losses, noise)


def size(plan: Plan) -> int:
    """Tensors, 9,000 bytes of other files, and headers that depend on the plan."""
    outer = sum(2 * a * b for name, (a, b) in HEAD.items() if name not in plan.targets)
    tensors = plan.nbytes({**MODEL, **HEAD}) + outer
    return tensors + 9_000 + len(json.dumps(plan.to_json())) + 100 * len(plan.targets)


def planner(**changes: Any) -> Planner:
    """A planner of MODEL; `changes` to it or to its wishes."""
    names = {item.name for item in dataclasses.fields(Wishes)}
    wishes = {"shapes": MODEL, "outer": HEAD, "candidates": TARGETS}
    wishes |= {name: changes.pop(name) for name in names & changes.keys()}
    given = {"scores": made_up({**MODEL, **HEAD}), "allocator": Milp(), "size": size, **changes}
    return Planner(wishes=Wishes(**wishes), **given)


@pytest.mark.parametrize("name", ["milp", "knapsack", "greedy", "waterfill"])
def test_bits_are_kept_and_used(name: str) -> None:
    for bits in (2.4, 2.8, 3.3, 4.0, 5.2, 7.7):
        choice = planner(allocator=allocators.get(name)()).choose(f"{bits}bpw")
        assert choice.bits <= bits
        assert choice.bits == choice.plan.bits(MODEL)
        assert choice.slack is not None
        assert choice.slack == int(bits * WEIGHTS / 8) - choice.plan.nbytes(MODEL)
        assert choice.step is not None
        assert choice.slack < choice.step
        assert choice.plan.targets.keys() == MODEL.keys()  # bits do not count the embedding
        assert choice.bound is not None
        assert choice.loss is not None
        assert choice.bound <= choice.loss * (1 + 1e-12)
        assert choice.next is not None
        assert choice.next.bpw is not None
        better = planner().choose(str(choice.next))
        assert better.loss is not None
        assert better.loss < choice.loss


@pytest.mark.parametrize("name", ["milp", "knapsack", "greedy", "waterfill"])
def test_bytes_are_kept_though_headers_depend_on_the_plan(name: str) -> None:
    calls = 0

    def counted(plan: Plan) -> int:
        nonlocal calls
        calls += 1
        return size(plan)

    chooser = planner(allocator=allocators.get(name)(), size=counted)
    for limit in range(130_000, 330_000, 7_777):
        calls = 0
        choice = chooser.choose(f"{limit}B")
        assert choice.nbytes == size(choice.plan) <= limit
        assert choice.slack == limit - choice.nbytes
        assert calls <= 9
        assert choice.step is not None
        # headers change by some hundred bytes from plan to plan
        assert choice.nbytes >= 0.995 * limit or choice.slack < choice.step + 600


def test_both_limits_hold_and_either_may_bind() -> None:
    for text, bits, nbytes in (("4bpw & 400kB", 4, 400_000), ("4bpw & 150kB", 4, 150_000)):
        choice = planner().choose(text)
        assert choice.bits <= bits
        assert choice.nbytes <= nbytes
    assert planner().choose("4bpw & 400kB").bits > 3.9
    assert planner().choose("4bpw & 150kB").bits < 3


def test_a_device_has_its_own_measure() -> None:
    def device(budget: Budget) -> Room:
        assert (budget.context, budget.batch) == (8192, 2)
        assert budget.device_bytes is not None
        return Room(budget.device_bytes - 100_000, lambda plan: size(plan) + 555)

    choice = planner(device=device).choose("fits 300kB @ 8192x2")
    assert choice.nbytes + 555 <= 200_000
    assert choice.slack == 200_000 - 555 - choice.nbytes
    assert choice.nbytes > 195_000
    with pytest.raises(ValueError, match="knows what a device needs"):
        planner().choose("fits 300kB @ 8192x2")
    grid = Grid.parse("int4-g64-z")
    one = uniform(MODEL, (grid,), "fits 400kB @ 8192x2", size=size, device=device)
    assert one.grid == grid
    with pytest.raises(Infeasible):
        uniform(MODEL, (grid,), "fits 300kB @ 8192x2", size=size, device=device)


def test_room_for_everything_leaves_the_model_as_it_is() -> None:
    keep = (*TARGETS, Target())
    for text in ("16bpw", "99bpw", "10MB", f"{size(Plan(dict.fromkeys(MODEL, Target())))}B"):
        choice = planner(candidates=keep).choose(text)
        assert choice.plan.targets == dict.fromkeys(MODEL, Target()), text
        assert (choice.loss, choice.bound) == (0, 0)
    assert set(planner().choose("16bpw").plan.targets.values()) == {
        Target((PartSpec(Grid("bf16")),))
    }


def test_a_floor_finds_the_smallest_plan_that_is_good_enough() -> None:
    for loss in (0.5, 0.05, 0.005):
        choice = planner().choose(f"{loss}nats")
        assert choice.loss is not None
        assert 0.98 * loss <= choice.loss <= loss * (1 + 1e-9)
        again = planner().choose(f"{choice.nbytes}B")
        assert again.loss == pytest.approx(choice.loss, rel=0.02)
    relative = dataclasses.replace(made_up({**MODEL, **HEAD}), unit="relative")
    with pytest.raises(ValueError, match="has no unit"):
        planner(scores=relative).choose("0.05nats")
    fitted = dataclasses.replace(relative, factor=2.0)
    double = planner(scores=fitted).choose("0.1nats")
    assert double.loss == pytest.approx(2 * planner().choose("0.05nats").loss)
    with pytest.raises(Infeasible):
        planner().choose("0.005nats & 150kB")


def test_scores_without_a_unit_order_but_do_not_promise() -> None:
    relative = dataclasses.replace(made_up({**MODEL, **HEAD}), unit="relative")
    choice = planner(scores=relative).choose("3bpw")
    assert choice.plan.targets == planner().choose("3bpw").plan.targets
    assert (choice.loss, choice.noise, choice.bound) == (None, None, None)


def test_infeasible_says_what_takes_the_room() -> None:
    with pytest.raises(Infeasible, match=r"smallest: 2\.\d+ bpw, .*embedding and head: ") as caught:
        planner(keep=("model.embed_tokens",)).choose("100kB")
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(Infeasible, match=r"bpw, of which kept layers: 153,600 bytes"):
        planner(keep=("*.down_proj",)).choose("3bpw")
    with pytest.raises(Infeasible, match="everywhere else"):
        planner().choose("1bpw")


def test_kept_layers_have_reasons() -> None:
    choice = planner(keep=("*.0.*.v_proj",)).choose("4bpw")
    assert choice.kept["model.layers.0.self_attn.v_proj"] == "keep pattern '*.0.*.v_proj'"
    assert "does not count" in choice.kept["model.embed_tokens"]
    assert choice.plan.targets["model.layers.0.self_attn.v_proj"].kept
    unscored = planner(scores=made_up(MODEL)).choose("400kB")
    assert unscored.kept["model.embed_tokens"] == "was not measured"
    rich = planner().choose("12bpw").kept
    assert "the best use of the budget" in rich.values()


def test_minimum_bits() -> None:
    choice = planner(minimum={"*.v_proj": 5, "*.0.*": 4}).choose("4bpw")
    for name, target in choice.plan.targets.items():
        least = 5 if name.endswith("v_proj") else 4 if ".0." in name else 2
        assert target.grid is not None
        assert target.grid.bits >= least
    above = planner(minimum={"*.0.*.v_proj": 9}, candidates=TARGETS[:-1]).choose("4bpw")
    assert above.plan.targets["model.layers.0.self_attn.v_proj"].kept


def test_coupled_layers_agree() -> None:
    groups = coupled("vllm", [
        {role: f"model.layers.{block}.{path}" for role, path in roles.items()}
        for block in range(4)
        for roles in (
            {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
            {"o": "self_attn.o_proj"},
            {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
            {"down": "mlp.down_proj"},
        )
    ])  # fmt: skip
    assert len(groups) == 8
    together, free = (planner(groups=some).choose("3.3bpw") for some in (groups, []))
    for group in groups:
        assert len({together.plan.targets[name] for name in group}) == 1
    assert any(len({free.plan.targets[name] for name in group}) > 1 for group in groups)
    assert together.loss is not None
    assert free.loss is not None
    assert together.loss > free.loss
    with pytest.raises(ValueError, match="part of layers that must be alike"):
        planner(groups=groups, keep=("*.q_proj",)).choose("4bpw")
    with pytest.raises(ValueError, match="part of layers that must be alike"):
        planner(groups=groups, minimum={"*.up_proj": 4}).choose("4bpw")
    planner(groups=groups, keep=("*.0.self_attn.[qkv]_proj",)).choose("6bpw")


def test_coupling_by_profile() -> None:
    groups = [
        {"q": "l.0.q", "k": "l.0.k", "v": "l.0.v", "gate": "l.0.gate", "up": "l.0.up"},
        {"gate": "l.1.mlp.experts.0.gate_proj", "up": "l.1.mlp.experts.0.up_proj"},
        {"down": "l.1.mlp.experts.0.down_proj"},
        {"gate": "l.1.mlp.experts.1.gate_proj"},
        {"down": "l.2.mlp.experts.0.down_proj"},
        {"qkv": "l.3.qkv"},
    ]
    assert coupled("vllm", groups) == [
        ("l.0.q", "l.0.k", "l.0.v"),
        ("l.0.gate", "l.0.up"),
        tuple(layer for roles in groups[1:4] for layer in roles.values()),
    ]
    for profile in ("aptq", "transformers", "gguf"):
        assert coupled(profile, groups) == []


def test_bad_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        planner(keep=("*.qproj",)).choose("4bpw")
    with pytest.raises(ValueError, match="matches no layer"):
        planner(minimum={"*.qproj": 4}).choose("4bpw")
    with pytest.raises(ValueError, match="no score for"):
        planner(scores=made_up(dict(list(MODEL.items())[1:]))).choose("4bpw")
    with pytest.raises(ValueError, match="no score for"):
        planner(candidates=(*TARGETS, Target((PartSpec(Grid("int4", 16)),)))).choose("4bpw")
    with pytest.raises(ValueError, match="which the model lacks"):
        planner(scores=made_up({**MODEL, "other": (8, 8)})).choose("4bpw")


def test_the_published_rule_reads_code_bits() -> None:
    pair = tuple(Target((PartSpec(Grid(f"int{bits}", 32)),)) for bits in (2, 4))
    scores = made_up(MODEL, targets=pair)
    choice = planner(candidates=pair, scores=scores, allocator=Threshold()).choose("3.5bpw")
    bits = [(t.grid.bits, math.prod(MODEL[n])) for n, t in choice.plan.targets.items() if t.grid]
    assert 3.3 < sum(b * count for b, count in bits) / WEIGHTS <= 3.5
    assert choice.bits > 3.7  # with scales
    stored = Threshold(count="bytes")
    assert planner(candidates=pair, scores=scores, allocator=stored).choose("3.5bpw").bits <= 3.5
    traces = {name: (row[0], row[0]) for name, row in scores.losses.items()}
    same = dataclasses.replace(scores, losses=traces)  # a trace knows nothing of candidates
    ranked = planner(candidates=pair, scores=same, allocator=Threshold()).choose("3.5bpw")
    assert ranked.plan.targets == choice.plan.targets
    both = planner(candidates=pair, scores=scores, allocator=Threshold()).choose("3.5bpw & 230kB")
    assert both.nbytes <= 230_000
    assert both.bits < choice.bits


def test_the_front_has_every_choice_below_or_on_it() -> None:
    front = planner().front()
    assert all(a.nbytes < b.nbytes and a.loss > b.loss for a, b in pairwise(front))
    for text in ("150kB", "200kB", "300kB"):
        choice = planner().choose(text)
        assert choice.loss is not None
        ahead = [point for point in front if point.nbytes <= choice.nbytes]
        assert choice.loss <= ahead[-1].loss * 1.01
        later = [point for point in front if point.nbytes > choice.nbytes]
        assert choice.loss >= later[0].loss
    inner = planner().front(outer=False)
    assert inner[-1].bits == 16
    assert inner[-1].loss == pytest.approx(0, abs=1e-12)
    assert all(a.bits < b.bits for a, b in pairwise(inner))


def test_differences_within_the_noise_are_not_paid_for() -> None:
    options = [
        Option(target, (cost,), loss, noise)
        for target, cost, loss, noise in (
            (TARGETS[0], 10, 1.0, 0.05),
            (TARGETS[1], 12, 0.97, 0.05),  # less than its noise better
            (TARGETS[2], 14, 1.2, 0.0),  # dearer and worse
            (TARGETS[3], 16, 0.4, 0.05),
            (TARGETS[4], 18, -0.2, 0.6),  # counts as 0: better than 0.4 by less than 0.6
            (Target(), 64, 0.0, 0.6),  # 16 bits stay
        )
    ]
    assert [o.cost[0] for o in significant(options, 1.0)] == [10, 16, 64]
    assert [o.cost[0] for o in significant(options, 0.0)] == [10, 12, 16, 18, 64]


def test_a_real_checkpoint_s_bytes(tmp_path: Path) -> None:
    model = Model.open(tiny_model("llama", tmp_path, torch.bfloat16))
    everything = {**model.shapes, **model.outer_shapes}

    def exact(plan: Plan) -> int:
        return predict(model, plan).total

    chooser = planner(
        shapes=model.shapes, outer=model.outer_shapes, scores=made_up(everything), size=exact
    )
    front = chooser.front()
    for part in range(1, 11):
        limit = front[0].nbytes + (front[-1].nbytes - front[0].nbytes) * part // 11
        choice = chooser.choose(f"{limit}B")
        assert choice.nbytes == exact(choice.plan) <= limit
        assert choice.step is not None
        assert choice.slack is not None
        assert choice.nbytes >= 0.995 * limit or choice.slack < choice.step + 600
