"""fisher on embedding and head: equal to formulas of the whole model, and of use in a budget."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from aptq.core.plan import Plan, Target
from aptq.core.scores import Scores
from aptq.engine import outer as slicing
from aptq.engine.candidate import errors
from aptq.engine.layer import Layer
from aptq.engine.measure import Measure, Subject
from aptq.engine.outer import Outer
from aptq.engine.stage import Stage, methods
from aptq.engine.stream import Where
from aptq.engine.tail import sample
from aptq.failures import Infeasible
from aptq.model.model import Model
from aptq.pipeline import compress, measure, plan
from aptq.recipe import Recipe
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model

TARGETS = tuple(Target.parse(text) for text in ("int2-g16-z", "int4-g16-z", "bf16"))
LENGTH, SEED = 16, 3
RTN, GPTQ = methods.get("rtn")(), methods.get("gptq")()
UNTIED = ("llama", "granite")
# tied and not; soft-cap, scaled logits, scaled embeddings, positions that are added
FAMILIES = (*UNTIED, "qwen2", "gemma2", "cohere2", "gpt2", "opt")


def subject(
    source: Path, work: Path, stage: Stage = RTN, count: int = 5, where: Where = "memory"
) -> Subject:
    model = Model.open(source)
    names = frozenset(model.outer_shapes)
    ids = windows(count, LENGTH)
    return Subject(model, ids, CPU, work, where, (stage,), TARGETS, names, seed=SEED)


def fisher(**options: object) -> Measure:
    made = methods.get("fisher")(**options)
    assert isinstance(made, Measure)
    return made


class Whole:
    """Inputs and gradients at both ends, [windows, length, ...] float64, by autograd."""

    def __init__(self, source: Path, ids: Tensor, labels: str = "sampled") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source).eval()
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                seen[f"{name} x"] = args[0].detach()
                output.register_hook(lambda grad: seen.update({name: grad}))

            return hook

        embed.register_forward_hook(keep("embed"))
        head.register_forward_hook(keep("head"))
        logits = self.model(ids, use_cache=False).logits
        generator = torch.Generator().manual_seed(SEED)
        chance = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
        following = F.pad(ids[:, 1:], (0, 1), value=-100)
        label = sample(logits.detach(), chance) if labels == "sampled" else following
        F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum").backward()
        self.ids, self.x, self.g = ids, seen["head x"].double(), seen["head"].double()
        scale = getattr(embed, "scalar_embed_scale", 1.0)
        self.e = seen["embed"].double() * scale
        self.weights = {"embed": embed.weight.detach(), "head": head.weight.detach()}

    def damage(self, end: str, dW: Tensor, some: slice = slice(None)) -> float:
        """Sum over the tokens of some windows."""
        dW = dW.double()
        if end == "embed":
            return float(0.5 * (self.e[some].square() * dW[self.ids[some]].square()).sum())
        X = self.x.flatten(0, 1)
        rows = ((dW @ (X.T @ X / len(X))) * dW).sum(1)
        return float(0.5 * self.g[some].square().sum((0, 1)) @ rows)


def rounded(weight: Tensor, target: Target) -> Tensor:
    (found,) = errors(Layer("", "", weight, None, target), (target,), (RTN,))
    return found


def check(found: Scores, model: Model, whole: Whole, changes: dict[str, list[Tensor]]) -> None:
    assert [*found.losses] == [*model.outer_shapes]
    tokens = whole.ids.numel()
    for name in found.losses:
        ends = ["embed" if name == model.arch.embed else "head"]
        ends += ["head"] if model.head_tied else []
        wanted = [sum(whole.damage(end, dW) for end in ends) / tokens for dW in changes[name]]
        assert found.losses[name] == pytest.approx(wanted, rel=1e-4)
        first = changes[name][0]
        halves = [
            sum(whole.damage(end, first, slice(parity, None, 2)) for end in ends)
            / whole.ids[parity::2].numel()
            for parity in (0, 1)
        ]
        assert found.noise[name][0] == pytest.approx(abs(halves[0] - halves[1]) / 2, rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_formula_on_the_whole_model(name: str, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path)
    on = subject(source, tmp_path)
    assert on.model.head_tied == (name not in UNTIED)
    assert len(on.names) == (2 if name in UNTIED else 1)
    whole = Whole(source, on.ids)
    weights = {
        on.model.arch.head: whole.weights["head"],
        on.model.arch.embed: whole.weights["embed"],
    }
    changes = {n: [rounded(weights[n], target) for target in TARGETS] for n in on.names}
    found = fisher().run(on)
    assert found.unit == "nats"
    check(found, on.model, whole, changes)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_labels_disk_slices_and_forms_change_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model(name, tmp_path)
    on = subject(source, tmp_path)
    whole = Whole(source, on.ids, "data")
    weights = {
        on.model.arch.head: whole.weights["head"],
        on.model.arch.embed: whole.weights["embed"],
    }
    changes = {n: [rounded(weights[n], target) for target in TARGETS] for n in on.names}
    monkeypatch.setattr(slicing, "SLICE", 48 * 24)
    disk = replace(on, where="disk", names=on.names | {"model.layers.0.mlp.up_proj"})
    found = fisher(form="row", labels="data").run(disk)
    alone = found.losses["model.layers.0.mlp.up_proj"]
    assert min(alone) > 0
    inner = {"model.layers.0.mlp.up_proj"}
    outside = replace(
        found,
        losses={n: row for n, row in found.losses.items() if n not in inner},
        noise={n: row for n, row in found.noise.items() if n not in inner},
    )
    check(outside, on.model, whole, changes)
    assert not list(tmp_path.glob("tape-*"))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_errors_are_those_that_compressing_makes(name: str, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path)
    on = subject(source, tmp_path, GPTQ, count=8)
    whole, model = Whole(source, on.ids), Model.open(source)
    weights = {model.arch.head: whole.weights["head"], model.arch.embed: whole.weights["embed"]}
    changes: dict[str, list[Tensor]] = {n: [] for n in on.names}
    for target in TARGETS[:2]:
        kept = dict.fromkeys(model.shapes, Target())
        outer = Outer(model, Plan(kept | {model.arch.embed: target}), [GPTQ], CPU)
        outer.compress_embedding(on.ids, folder=tmp_path)
        dense = outer.parts[model.arch.embed][0].dense()
        changes[model.arch.embed].append(dense - weights[model.arch.embed])
    found = fisher().run(replace(on, names=frozenset({model.arch.embed})))
    ends = ["embed", "head"] if model.head_tied else ["embed"]
    for number, dW in enumerate(changes[model.arch.embed]):
        wanted = sum(whole.damage(end, dW) for end in ends) / on.ids.numel()
        assert found.losses[model.arch.embed][number] == pytest.approx(wanted, rel=1e-2)
        by_rtn = sum(
            whole.damage(end, rounded(weights[model.arch.embed], TARGETS[number])) for end in ends
        )
        if model.head_tied:  # there are columns to compensate
            assert wanted < 0.98 * by_rtn / on.ids.numel()


@pytest.mark.parametrize("name", ["trace", "error", "delta", "kl", "uniform", "position"])
def test_others_refuse(name: str, tmp_path: Path) -> None:
    on = subject(tiny_model("llama", tmp_path), tmp_path)
    made = methods.get(name)()
    assert isinstance(made, Measure)
    with pytest.raises(ValueError, match=r"(?s)embed_tokens, lm_head\nuse fisher") as caught:
        made.run(on)
    assert len(str(caught.value).splitlines()) == 3


HEAD = "budget = '{}'\ngrids = ['int2-g16-z', 'int3-g16-z', 'int4-g16-z', 'int4-g32-z', 'int6-g16-z', 'int8-g16-z', 'bf16']\n"  # noqa: E501
TABLES = (
    "[[stage]]\nuse = 'gptq'\n[data]\nsamples = 4\nlength = 32\n[allocate]\nuse = 'milp'\n"
    "[measure]\nuse = '{}'\n"
)


def recipe(budget: str, outer: bool = True, name: str = "fisher") -> Recipe:
    head = HEAD.format(budget) + ("outer = true\n" if outer else "")
    return Recipe.parse(head + TABLES.format(name), "here")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_budget_below_the_kept_embedding(name: str, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path, torch.bfloat16)
    out, budget = tmp_path / "out", 50_000 if name == "llama" else 45_000
    with pytest.raises(Infeasible, match="no plan fits the budget"):
        compress(source, tmp_path / "kept", recipe=recipe(f"{budget}B", outer=False))
    done = compress(source, out, recipe=recipe(f"{budget}B"))
    written = sum(path.stat().st_size for path in (out / "checkpoint").iterdir())
    assert written == done.bytes_after <= budget
    scores, targets = Scores.load(out / "scores.json"), Plan.load(out / "plan.json").targets
    outside = Model.open(source).outer_shapes
    assert outside.keys() <= scores.losses.keys()
    assert outside.keys() & targets.keys()
    choice = plan(source, recipe(f"{budget}B"), scores=scores)
    assert choice.nbytes == written
    assert choice.slack == budget - written
    assert written >= 0.995 * budget or (choice.step is not None and choice.step > choice.slack)
    assert choice.loss is not None
    assert done.expected_loss == pytest.approx((choice.loss, choice.noise))


def test_recipes_that_ask_and_cannot(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    with pytest.raises(ValueError, match="'error' knows layers inside the blocks only"):
        compress(source, tmp_path / "out", recipe=recipe("60kB", name="error"))
    with pytest.raises(ValueError, match="use fisher, or set outer = false"):
        measure(source, tmp_path / "scores.json", recipe=recipe("60kB", name="kl"))
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_scores_of_outer_layers_serve_recipes_that_keep_them(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    asked = replace(recipe("8bpw"), keep=("lm_head",))
    scores = measure(source, tmp_path / "scores.json", recipe=asked)
    assert scores.losses.keys() == {*Model.open(source).shapes, "model.embed_tokens"}
    choice = plan(source, recipe("140kB", outer=False), scores=scores)
    assert not {"lm_head", "model.embed_tokens"} & choice.plan.targets.keys()
    freed = plan(source, asked, scores=scores)
    assert freed.kept["lm_head"] == "keep pattern 'lm_head'"
