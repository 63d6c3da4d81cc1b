"""Measures equal their formulas, worked out on the whole model with automatic differentiation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from aptq.core.plan import Target
from aptq.core.scores import Scores
from aptq.engine.candidate import errors
from aptq.engine.judge import fit_factor, judge, validity
from aptq.engine.layer import Layer
from aptq.engine.measure import Measure, Subject
from aptq.engine.stage import Stage, methods
from aptq.engine.stat import Stat
from aptq.engine.tail import sample
from aptq.failures import Shortage
from aptq.model.model import Model
from aptq.model.normalise import normalise_model
from aptq.stats.hessian import Hessian
from tests.engine.run import CPU, walked, windows
from tests.tiny import tiny_model

TARGETS = tuple(Target.parse(text) for text in ("int2-g16-z", "int4-g16-z", "int8-g16-z"))
COUNT, LENGTH, SEED = 5, 16, 3
RTN, GPTQ = methods.get("rtn")(), methods.get("gptq")()
OPTIONS: list[tuple[str, dict[str, object]]] = [
    ("trace", {"weigh": "error"}),
    ("trace", {"weigh": "error", "hessian": "layer"}),
    ("error", {}),
    ("fisher", {"form": "token"}),
    ("fisher", {"form": "sequence"}),
    ("fisher", {"form": "row"}),
    ("delta", {}),
    ("kl", {"around": "float"}),
    ("kl", {"around": "plan"}),
    ("uniform", {}),
    ("position", {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), torch.float32)


def subject(source: Path, work: Path, stage: Stage = RTN, count: int = COUNT) -> Subject:
    model = Model.open(source)
    ids = windows(count, LENGTH)
    names = frozenset(model.shapes)
    return Subject(model, ids, CPU, work, "memory", (stage,), TARGETS, names, seed=SEED)


def measure(name: str, **options: object) -> Measure:
    made = methods.get(name)(**options)
    assert isinstance(made, Measure)
    return made


def whole(source: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    normalise_model(model, model.config)
    return model


@dataclass
class Seen:
    """Inputs and output gradients of a linear, [windows, length, width]."""

    x: Tensor
    g: Tensor


def watched(source: Path, ids: Tensor, labels: str) -> dict[str, Seen]:
    """One backward pass of the whole model."""
    model, found = whole(source), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(
                lambda grad: found.update({name: Seen(args[0].detach(), grad.detach())})
            )

        return hook

    for name, module in model.named_modules():
        if type(module) is nn.Linear and "layers" in name:
            module.register_forward_hook(keep(name))
    logits = model(ids, use_cache=False).logits
    generator = torch.Generator().manual_seed(SEED)
    chance = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    next_ids = F.pad(ids[:, 1:], (0, 1), value=-100)
    target = sample(logits.detach(), chance) if labels == "sampled" else next_ids
    F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").backward()
    return found


def change(model: nn.Module, name: str, target: Target) -> Tensor:
    """dW by rounding, float64."""
    weight = model.get_submodule(name).weight.detach()
    (found,) = errors(Layer(name, "", weight, None, target), (target,), (RTN,))
    return found.double()


def close(found: Scores, wanted: dict[str, list[float]], rtol: float = 1e-4) -> None:
    assert found.losses.keys() == wanted.keys()
    for name, row in wanted.items():
        torch.testing.assert_close(
            torch.tensor(found.losses[name]), torch.tensor(row), rtol=rtol, atol=0, msg=name
        )


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": lambda x, g, dW: 0.5 * ((x @ dW.T) * g).sum(-1).square().sum(),
    "sequence": lambda x, g, dW: 0.5 * ((x @ dW.T) * g).sum((1, 2)).square().sum(),
    "absolute": lambda x, g, dW: (torch.einsum("wto,wti->woi", g, x) * dW).abs().sum(),
}


@pytest.mark.parametrize("form", FORMULAS)
def test_gradient_measures_equal_their_formulas(form: str, folder: Path, tmp_path: Path) -> None:
    made = measure("delta") if form == "absolute" else measure("fisher", form=form)
    on = subject(folder, tmp_path)
    found, model = made.run(on), whole(folder)
    seen = watched(folder, on.ids, "data" if form == "absolute" else "sampled")
    wanted: dict[str, list[float]] = {}
    for name, (x, g) in ((n, (s.x.double(), s.g.double())) for n, s in seen.items()):
        changes = [change(model, name, target) for target in TARGETS]
        wanted[name] = [float(FORMULAS[form](x, g, dW)) / on.ids.numel() for dW in changes]
        halves = [
            FORMULAS[form](x[i::2], g[i::2], changes[0]) / x[i::2, :, 0].numel() for i in (0, 1)
        ]
        assert found.noise[name][0] == pytest.approx(
            float((halves[0] - halves[1]).abs() / 2), rel=1e-3
        )
    assert found.unit == "nats"
    close(found, wanted)


def test_row_form_equals_its_formula(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    found, model = measure("fisher", form="row").run(on), whole(folder)
    wanted: dict[str, list[float]] = {}
    for name, seen in watched(folder, on.ids, "sampled").items():
        x, g = (t.flatten(0, 1).double() for t in (seen.x, seen.g))
        H, rows = x.T @ x, g.square().mean(0)
        changes = [change(model, name, target) for target in TARGETS]
        wanted[name] = [
            float(0.5 * rows @ ((dW @ H) * dW).sum(1)) / on.ids.numel() for dW in changes
        ]
    close(found, wanted)


def test_profiles_come_with_gradients(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    found = measure("fisher").run(on)
    assert found.window == LENGTH
    for name, seen in watched(folder, on.ids, "sampled").items():
        square = seen.g.square().sum(-1).mean(0)
        wanted = [square[0], square[1], square[2:4].mean(), square[4:8].mean(), square[8:].mean()]
        torch.testing.assert_close(
            torch.tensor(found.profiles[name]), torch.stack(wanted), rtol=1e-4, atol=0
        )


def test_error_is_the_objective_of_the_real_quantizer(folder: Path, tmp_path: Path) -> None:
    """In block 0, whose inputs are the same in a run that compresses."""
    on = subject(folder, tmp_path, GPTQ)
    found = measure("error").run(on)
    for number, target in enumerate(TARGETS):
        done = walked(on.model, [GPTQ], on.plan(target), tmp_path, ids=on.ids)
        for name, layer in done.layers.items():
            if ".0." in name and layer.stats:  # a commit drops those of later groups
                assert found.losses[name][number] == pytest.approx(GPTQ.objective(layer), rel=1e-4)
    plain = measure("error").run(replace(on, stages=(RTN,)))
    assert sum(row[0] for row in found.losses.values()) < sum(
        row[0] for row in plain.losses.values()
    )


def test_error_of_later_blocks_sees_original_inputs(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    found, model = measure("error").run(on), whole(folder)
    wanted = {
        name: [
            float((seen.x.double() @ change(model, name, target).T).square().sum()) / on.ids.numel()
            for target in TARGETS
        ]
        for name, seen in watched(folder, on.ids, "data").items()
    }
    close(found, wanted)


def test_trace_of_the_own_output(folder: Path, tmp_path: Path) -> None:
    on, model = subject(folder, tmp_path), whole(folder)
    plain = measure("trace", hessian="layer").run(on)
    weighed = measure("trace", hessian="layer", weigh="error").run(on)
    for name, seen in watched(folder, on.ids, "data").items():
        wanted = float(seen.x.double().square().mean())
        assert plain.losses[name] == pytest.approx((wanted, wanted, 0.0), rel=1e-5)
        sizes = [float(change(model, name, target).square().sum()) for target in TARGETS]
        assert weighed.losses[name] == pytest.approx([wanted * size for size in sizes], rel=1e-5)
    assert plain.noise[name][0] > 0


def test_trace_of_the_attention_equals_its_jacobian(folder: Path, tmp_path: Path) -> None:
    """v exactly; q and k, whose estimates are random, roughly; o by its own output."""
    on = replace(subject(folder, tmp_path), ids=windows(2, 6))
    attention = whole(folder).get_submodule("model.layers.0.self_attn")
    calls: list[dict[str, object]] = []
    model = whole(folder)
    model.get_submodule("model.layers.0.self_attn").register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(on.ids, use_cache=False)
    found = measure("trace").run(on)
    for role, rel in (("v", 1e-4), ("o", 1e-4), ("q", 0.5), ("k", 0.7)):
        name = f"{role}_proj.weight"

        def output(weight: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(attention, {name: weight}, (), dict(calls[0]))[0]

        weight = attention.get_parameter(name).detach()
        jacobian = torch.autograd.functional.jacobian(output, weight)
        wanted = float(jacobian.double().square().sum()) / weight.numel() / on.ids.numel()
        layer = f"model.layers.0.self_attn.{role}_proj"
        assert found.losses[layer] == pytest.approx((wanted, wanted, 0.0), rel=rel), role


@torch.no_grad()
def divergence(model: nn.Module, wanted: Tensor, ids: Tensor) -> float:
    got = model(ids, use_cache=False).logits.double().log_softmax(-1)
    target = wanted.double().log_softmax(-1)
    return float((target.exp() * (target - got)).sum(-1).mean())


def test_kl_equals_surgery(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    found, model = measure("kl", windows=3).run(on), whole(folder)
    ids = on.ids[:3]
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    table: dict[str, list[float]] = {}
    for name in on.model.shapes:
        weight = model.get_submodule(name).weight
        held = weight.data
        for target in TARGETS:
            weight.data = held + change(model, name, target).float()
            table.setdefault(name, []).append(divergence(model, wanted, ids))
            weight.data = held
    for name, row in table.items():  # the last candidate's divergence is near what float32 resolves
        assert found.losses[name] == pytest.approx(row, rel=1e-3, abs=1e-7)


def test_kl_around_a_plan_equals_surgery(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    found = measure("kl", around="plan", base="int2-g16-z").run(on)
    model = whole(folder)
    with torch.no_grad():
        wanted = model(on.ids, use_cache=False).logits
    original = {name: model.get_submodule(name).weight.data for name in on.model.shapes}
    changes = {n: [change(model, n, target).float() for target in TARGETS] for n in original}
    for name, weight in original.items():
        model.get_submodule(name).weight.data = weight + changes[name][0]
    for name, weight in original.items():
        linear = model.get_submodule(name)
        linear.weight.data = weight
        alone = divergence(model, wanted, on.ids)
        for number, dW in enumerate(changes[name]):
            linear.weight.data = weight + dW
            loss = divergence(model, wanted, on.ids) - alone
            assert found.losses[name][number] == pytest.approx(loss, rel=1e-3, abs=1e-5)
        linear.weight.data = weight + changes[name][0]


def test_kl_needs_the_model_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = measure("kl")
    monkeypatch.setitem(type(made).tabulate.__globals__, "free_bytes", lambda device: 1000)
    with pytest.raises(Shortage, match="1,000 free"):
        made.run(subject(folder, tmp_path))
    with pytest.raises(ValueError, match="no candidate"):
        measure("kl", base="int5-g16-z").run(subject(folder, tmp_path))


def test_judge_equals_surgery(folder: Path, tmp_path: Path) -> None:
    on, model = subject(folder, tmp_path), whole(folder)
    with torch.no_grad():
        wanted = model(on.ids, use_cache=False).logits
    low = [name for number, name in enumerate(sorted(on.names)) if number % 2]
    plan = on.plan(TARGETS[1], dict.fromkeys(low, TARGETS[0]))
    for name, target in plan.targets.items():
        dW = change(model, name, target).float()
        model.get_submodule(name).weight.data += dW
    assert judge(on, plan) == pytest.approx(divergence(model, wanted, on.ids), rel=1e-4)
    assert judge(on, on.plan(Target())) == 0.0


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_measure(name: str, options: dict[str, object], folder: Path, tmp_path: Path) -> None:
    """Same table twice; more bits are better; 16 bits of a 16-bit model cost nothing."""
    source = tiny_model("llama", tmp_path / "half", torch.bfloat16)
    dense, kept = Target.parse("bf16"), Target()
    on = replace(subject(source, tmp_path, GPTQ), targets=(*TARGETS, dense, kept))
    one, two = (measure(name, **options).run(on) for _ in range(2))
    assert one == two
    assert one.losses.keys() == on.names
    assert one.candidates == tuple(map(str, on.targets))
    assert one.record["stages"].startswith("GPTQ(")
    for layer, row in one.losses.items():
        assert row[3:] == (0.0, 0.0), layer
        assert one.noise[layer][3:] == (0.0, 0.0)
    totals = [sum(row[number] for row in one.losses.values()) for number in range(3)]
    assert totals[2] < 0.1 * totals[0]  # delta is linear in the error, all others quadratic
    assert totals[2] < totals[1] < totals[0]


def test_only_named_layers_are_scored(folder: Path, tmp_path: Path) -> None:
    some = frozenset({"model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"})
    on = replace(subject(folder, tmp_path), names=some)
    everything = measure("fisher").run(subject(folder, tmp_path))
    for name, options in OPTIONS:
        assert measure(name, **options).run(on).losses.keys() == some
    assert measure("fisher").run(on).losses["model.layers.1.mlp.down_proj"] == pytest.approx(
        everything.losses["model.layers.1.mlp.down_proj"]
    )
    with pytest.raises(ValueError, match="nothing to measure"):
        replace(on, names=frozenset({"lm_head.weight"}))
    with pytest.raises(ValueError, match="nothing to measure"):
        replace(on, targets=(Target(), Target.parse("bf16")))


@pytest.mark.parametrize("name", ["error", "fisher"])
def test_noise_shrinks_with_windows(name: str, folder: Path, tmp_path: Path) -> None:
    def mean_noise(count: int) -> float:
        found = measure(name).run(subject(folder, tmp_path, count=count))
        return sum(n[0] / found.losses[layer][0] for layer, n in found.noise.items())

    assert mean_noise(64) < 0.5 * mean_noise(4)
    assert mean_noise(1) == 0.0


@dataclass(frozen=True, kw_only=True)
class Weighted(Stage):
    """Rounds with a grid that depends on a Hessian whose rows the profile weights."""

    def needs(self) -> tuple[Stat, ...]:
        return (Hessian(rows="gradient", share=False),)

    def on_layer(self, layer: Layer) -> Layer:
        stat = layer.stats[self.needs()[0]]
        assert isinstance(stat, Hessian)
        MATRICES.setdefault(layer.name, []).append(stat.matrix().clone())
        return RTN.on_layer(layer)


MATRICES: dict[str, list[Tensor]] = {}


def test_stages_get_profiles_of_the_same_pass(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path, Weighted())
    MATRICES.clear()
    found = measure("fisher").run(on)
    bins = [0, 1, 2, 2, 3, 3, 3, 3, *[4] * 8]
    for name, seen in watched(folder, on.ids, "sampled").items():
        weights = torch.tensor(found.profiles[name])[bins]
        x = seen.x * weights.sqrt()[:, None]
        wanted = x.flatten(0, 1).T @ x.flatten(0, 1) / weights.sum() / COUNT
        assert len(MATRICES[name]) == len(TARGETS)
        torch.testing.assert_close(MATRICES[name][0], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "gemma3"])
def test_other_families(name: str, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path / "model", torch.float32)
    on = subject(source, tmp_path, GPTQ)
    for measure_name, options in OPTIONS:
        found = measure(measure_name, **options).run(on)
        assert found.losses.keys() == on.names
        totals = [sum(row[number] for row in found.losses.values()) for number in range(3)]
        assert totals[2] < totals[1] < totals[0]


def test_factor_turns_scores_into_nats(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    scores = measure("error").run(on)
    found = fit_factor(on, scores)
    tenfold = {name: tuple(10 * value for value in row) for name, row in scores.losses.items()}
    scaled = fit_factor(on, replace(scores, losses=tenfold))
    assert found.factor is not None
    assert scaled.factor == pytest.approx(found.factor / 10)
    assert scaled.residual == pytest.approx(found.residual)
    predicted = found.nats(on.plan(TARGETS[1]))
    assert predicted is not None
    assert found.residual is not None
    measured = judge(on, on.plan(TARGETS[1]))
    assert measured / 4 < predicted[0] < 4 * measured
    flat = replace(scores, losses={name: (1.0, 0.0, 0.0) for name in scores.losses})
    assert fit_factor(on, flat) is flat


def test_validity_tells_a_ranking_from_its_reverse(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    scores = measure("kl").run(on)
    right = validity(on, scores)
    assert [found.share for found in right] == [0.1, 0.25, 0.5]
    assert all(found.top > found.bottom and found.difference > 0.2 for found in right)
    turned = {name: tuple(-value for value in row) for name, row in scores.losses.items()}
    for one, other in zip(right, validity(on, replace(scores, losses=turned)), strict=True):
        assert other.difference < 0
        assert (other.top, other.bottom) == (one.bottom, one.top)


def test_rules_know_types_and_places(folder: Path, tmp_path: Path) -> None:
    on = subject(folder, tmp_path)
    even, placed = measure("uniform").run(on), measure("position").run(on)
    q, v = (f"model.layers.0.self_attn.{role}_proj" for role in ("q", "v"))
    weights = on.model.shapes[q][0] * on.model.shapes[q][1]
    assert even.losses[q] == tuple(weights * 4.0**-bits for bits in (2, 4, 8))
    assert placed.losses[v][0] / even.losses[v][0] > placed.losses[q][0] / even.losses[q][0]
    assert even.unit == placed.unit == "relative"
