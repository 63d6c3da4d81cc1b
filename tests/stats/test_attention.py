"""What the attention's output says about q, k and v equals autograd's Jacobian, and its limits."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aptq.core.grid import Grid
from aptq.core.parts import part_of
from aptq.core.plan import Plan
from aptq.core.rounding import fit, snap
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage
from aptq.model.attention import CHUNK
from aptq.model.model import Model
from aptq.stats.attention import AttentionHessian
from aptq.stats.hessian import Hessian
from tests.blocks import Opened, opened
from tests.engine.run import walked
from tests.tiny import tiny_model

LENGTH = 5


class Truth:
    """J^T J [out, in, out, in] by autograd, and its marginals."""

    def __init__(self, full: Tensor, heads: int) -> None:
        out, columns = full.shape[:2]
        size = out // heads
        self.full = full
        parts = full.view(heads, size, columns, heads, size, columns)
        self.inner = torch.einsum("hiahib->hab", parts)
        self.outer = torch.einsum("hiahja->hij", parts)


def called(block: Opened) -> tuple[tuple, dict]:
    """What the attention module is called with."""
    found = {}

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        found["call"] = args, kwargs

    handle = block.attention.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        block.call.run(block.module)
    handle.remove()
    return found["call"]


def jacobian(block: Opened, role: str, weights: Tensor | None = None) -> Tensor:
    """Sum over all outputs of the squared Jacobian, a mean over tokens; module's own code."""
    args, kwargs = called(block)
    weight = block.linear(role).weight
    weight.requires_grad_()
    answer = block.attention(*args, **kwargs)
    y = answer[0] if isinstance(answer, tuple) else answer
    if weights is not None:
        y = y * weights.sqrt()[:, None]
    rows = [
        torch.autograd.grad(value, weight, retain_graph=True)[0].flatten() for value in y.flatten()
    ]
    weight.requires_grad_(False)
    J = torch.stack(rows)
    return (J.T @ J).view(*weight.shape, *weight.shape) / (y.shape[0] * y.shape[1])


@cache
def truth(name: str, role: str, heads: int) -> Truth:
    return Truth(jacobian(block_of(name), role), heads)


def block_of(name: str) -> Opened:
    """A block in float64 throughout: the families' own q- and k-norms compute in float32."""
    block = opened(name, length=LENGTH)
    if name in ("qwen3", "gemma3"):
        for part in ("q_norm", "k_norm"):
            given = block.attention.get_submodule(part)
            norm = nn.RMSNorm(given.weight.shape[0], 1e-6, dtype=torch.float64)
            norm.weight.data = given.weight + (name == "gemma3")
            block.attention.set_submodule(part, norm.requires_grad_(False))
    return block


def observed(block: Opened, role: str, **options) -> AttentionHessian:
    chunk = options.pop("chunk", CHUNK)
    weights, batches = options.pop("weights", None), options.pop("batches", 1)
    need = AttentionHessian(**options)
    found = block.observe({role: need}, weights=weights, chunk=chunk, batches=batches)[role]
    assert isinstance(found, AttentionHessian)
    return found


def off(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return float((found - expected).norm() / expected.norm())


EXACT = [
    ("llama", "q", 4),  # GQA and rotary
    ("llama", "v", 2),
    ("qwen3", "q", 4),  # q-norm
    ("gemma3", "q", 4),  # (1 + weight) norm, own scaling, window
    ("gpt2", "q", 4),  # joined, biases, no rotary
    ("gpt2", "v", 4),
    ("phi3", "v", 2),
    ("cohere2", "v", 2),
]


@pytest.mark.parametrize(("name", "role", "heads"), EXACT)
def test_closed_forms_are_the_jacobian(name: str, role: str, heads: int) -> None:
    known, block = truth(name, role, heads), block_of(name)
    found = observed(block, role, mode="attn-kron", estimator="exact", per_head=True)
    assert off(found.inner(), known.inner) < 1e-10
    assert off(found.outer(), known.outer) < 1e-10
    assert found.tau(1) == pytest.approx(float(known.inner.diagonal(dim1=1, dim2=2).sum()))
    summed = observed(block, role, mode="attn-in", estimator="exact")
    assert off(summed.matrix(), known.inner.sum(0)) < 1e-10
    assert summed.inner() is None
    assert summed.outer() is None
    small = observed(block, role, mode="attn-kron", estimator="exact", per_head=True, chunk=16)
    assert off(small.inner(), known.inner) < 1e-10
    assert off(small.outer(), known.outer) < 1e-10


def test_soft_capped_scores() -> None:
    """Gemma-2's own code takes its softmax in float32, so the seam runs for both."""
    block = opened("gemma2", length=LENGTH)
    block.attention.attn_logit_softcapping = 0.5
    known = Truth(jacobian_of_run(block, "q"), 4)
    found = observed(block, "q", mode="attn-kron", estimator="exact", per_head=True)
    assert off(found.inner(), known.inner) < 1e-10
    assert off(found.outer(), known.outer) < 1e-10


def jacobian_of_run(block: Opened, role: str) -> Tensor:
    """J^T J through the seam's differentiable run."""
    found = {}

    def use(trace) -> None:
        run = trace.unit.run()
        z = run.outputs[trace.path]
        with torch.inference_mode(False), torch.enable_grad():
            rows = [
                _rows(torch.autograd.grad(value, z, retain_graph=True)[0])
                for value in run.y.flatten()
            ]
        found["dz"] = torch.stack(rows)  # [outputs, rows, out]

    block.traced(role, use)
    x = inputs(block, role)
    J = torch.einsum("yro,ri->yoi", found["dz"], x)
    shape = J.shape[1:]
    J = J.flatten(1)
    return (J.T @ J).view(*shape, *shape) / len(x)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize(
    ("name", "role", "heads"),
    [("llama", "k", 2), ("qwen3", "k", 2), ("olmo2", "q", 4)],
)
def test_probes_converge_as_one_over_the_root(name: str, role: str, heads: int) -> None:
    known, block = truth(name, role, heads), block_of(name)
    errors = {}
    for probes in (25, 400):
        seeds = [
            observed(block, role, mode="attn-kron", estimator="probe", per_head=True,
                     probes=probes, seed=seed)
            for seed in range(3)
        ]  # fmt: skip
        errors[probes] = [
            sum(off(one.inner(), known.inner) for one in seeds) / 3,
            sum(off(one.outer(), known.outer) for one in seeds) / 3,
        ]
    for before, after in zip(errors[25], errors[400], strict=True):
        assert 2.2 < before / after < 7, errors  # the root of 16 is 4, by few samples
    tau = float(known.inner.diagonal(dim1=1, dim2=2).sum())
    assert seeds[0].tau(1) == pytest.approx(tau, rel=0.15)


def test_signs_for_q_converge_as_one_over_the_root() -> None:
    known, block = truth("llama", "q", 4), opened("llama", length=LENGTH)
    found = [
        sum(
            off(observed(block, "q", mode="attn-in", signs=n, seed=seed).matrix(),
                known.inner.sum(0))
            for seed in range(3)
        )
        for n in (20, 320)
    ]  # fmt: skip
    assert 2.2 < found[0] / found[1] < 7, found


def test_every_batch_has_its_own_random_numbers() -> None:
    known, block = truth("llama", "k", 2), opened("llama", length=LENGTH)
    one = observed(block, "k", mode="attn-in", probes=8)
    again = observed(block, "k", mode="attn-in", probes=8)
    many = observed(block, "k", mode="attn-in", probes=8, batches=64)
    assert torch.equal(one.matrix(), again.matrix())
    assert off(many.matrix(), known.inner.sum(0)) < off(one.matrix(), known.inner.sum(0)) / 3


def test_attention_rows_weigh_a_token_by_its_effect() -> None:
    block = opened("llama", length=LENGTH)
    known = truth("llama", "q", 4)
    found = observed(block, "q", mode="layer", rows="attention", estimator="exact")
    expected = known.inner.sum(0)
    cosine = (found.matrix() * expected).sum() / found.matrix().norm() / expected.norm()
    assert float(cosine) == pytest.approx(1, abs=1e-10)
    assert found.outer() is None
    # v: the weights are a function of the token, so the probes' rows converge to them
    x, known_rows = inputs(block, "v"), row_effects(block, "v")
    found = observed(block, "v", mode="layer", rows="attention", probes=1000)
    weights = known_rows / known_rows.sum()
    assert off(found.matrix(), (x * weights[:, None]).T @ x) < 0.07


def inputs(block: Opened, role: str) -> Tensor:
    """Input rows of a linear."""
    found = {}
    with block.hooked(lambda name, x: found.setdefault(name, x.clone())), torch.no_grad():
        block.call.run(block.module)
    return _rows(found[role])


def row_effects(block: Opened, role: str) -> Tensor:
    """Squared derivative of all outputs by the linear's output at every token."""
    found = {}

    def use(trace) -> None:
        run = trace.unit.run()
        with torch.inference_mode(False), torch.enable_grad():
            rows = [
                torch.autograd.grad(value, run.outputs[trace.path], retain_graph=True)[0]
                for value in run.y.flatten()
            ]
        found["rows"] = torch.stack(rows).square().sum((0, 3)).flatten()

    block.traced(role, use)
    return found["rows"]


def test_gradient_rows_weigh_the_positions_of_the_output() -> None:
    weights = torch.tensor([5.0, 0.0, 1.0, 0.3, 2.0])
    for role, heads in (("q", 4), ("v", 2)):
        known = Truth(jacobian(opened("llama", length=LENGTH), role, weights.double()), heads)
        found = observed(
            opened("llama", length=LENGTH), role, mode="attn-kron", rows="gradient",
            estimator="exact", per_head=True, weights=weights,
        )  # fmt: skip
        assert off(found.inner(), known.inner) < 1e-6
        assert off(found.outer(), known.outer) < 1e-6
    known = Truth(jacobian(opened("llama", length=LENGTH), "k", weights.double()), 2)
    found = observed(
        opened("llama", length=LENGTH), "k", mode="attn-in", rows="gradient", probes=800,
        weights=weights,
    )  # fmt: skip
    assert off(found.matrix(), known.inner.sum(0)) < 0.1
    with pytest.raises(ValueError, match="measure profiles first"):
        observed(opened("llama", length=LENGTH), "q", mode="attn-in", rows="gradient")


def test_one_key_leaves_nothing_to_q_and_k() -> None:
    block = opened("llama", length=1)
    for role in ("q", "k"):
        found = observed(block, role, mode="attn-kron")
        assert float(found.matrix().abs().max()) < 1e-25
        assert float(found.outer().abs().max()) < 1e-25


def test_the_first_token_does_not_reach_q() -> None:
    effects = row_effects(opened("llama", length=LENGTH), "q").view(2, LENGTH)
    assert float(effects[:, 0].abs().max()) < 1e-25
    assert float(effects[:, 1:].min()) > 0
    block = opened("llama", length=LENGTH)
    only = torch.zeros(LENGTH)
    only[0] = 1.0
    found = observed(block, "q", mode="attn-in", rows="gradient", weights=only, estimator="exact")
    assert float(found.matrix().abs().max()) < 1e-25


def test_a_constant_added_to_all_keys_changes_nothing() -> None:
    before = observed(opened("gpt2", length=LENGTH), "q", mode="attn-kron", estimator="exact")
    block = opened("gpt2", length=LENGTH)
    bias = block.linear("k").bias
    assert bias is not None
    bias += torch.randn(len(bias), generator=torch.Generator().manual_seed(0))
    after = observed(block, "q", mode="attn-kron", estimator="exact")
    assert off(after.matrix(), before.matrix()) < 1e-10
    assert off(after.outer(), before.outer()) < 1e-10


def test_blend_lies_between_its_limits() -> None:
    block = opened("llama", length=LENGTH, windows=6)
    for role in ("q", "k", "v"):
        plain = observed(block, role, mode="layer").matrix().double()
        own = observed(block, role, mode="attn-kron")
        for weight in (0.0, 1.0, 3.0):
            found = observed(block, role, mode="blend", blend=weight)
            mixed = own.matrix() / own.matrix().trace() + weight * plain / plain.trace()
            assert off(found.matrix() / found.matrix().trace(), mixed / (1 + weight)) < 1e-6
            assert float(found.matrix().trace()) == pytest.approx(float(plain.trace()), rel=1e-5)
        boa = observed(block, role, mode="blend", blend=float("inf"))
        assert off(boa.matrix(), plain) < 1e-6
        assert off(boa.inner() or boa.matrix(), plain) < 1e-6
        expected = boa_outer(block, role)
        assert off(observed(block, role, mode="blend", blend=float("inf"), signs=400).outer(),
                   expected) < (1e-6 if role == "v" else 0.1)  # fmt: skip
        half = observed(block, role, mode="blend", blend=1.0).outer()
        traces = own.outer().diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        assert off(half, (own.outer() / traces + boa.outer()) / 2) < 1e-6


def boa_outer(block: Opened, role: str) -> Tensor:
    """Output sides of BoA with trace 1, by explicit rotations; [heads, e, e]."""
    (_, kwargs), x = called(block), inputs(block, "q")
    heads = 2 if role != "q" else 4
    if role == "v":
        W = block.linear("o").weight.detach().view(48, 4, 12).transpose(0, 1)
        found = (W.mT @ W).view(2, 2, 12, 12).mean(1)
    else:
        cos, sin = kwargs["position_embeddings"]
        eye = torch.eye(12, dtype=torch.float64)
        half = torch.cat([eye[6:] * -1, eye[:6]])  # rotate_half as a matrix on columns
        R = eye * cos[0][:, :, None] + half * sin[0][:, :, None]  # [T, e, e]
        other = "k" if role == "q" else "q"
        z = (x @ block.linear(other).weight.T).view(6, LENGTH, -1, 12)
        rotated = torch.einsum("tij,bthj->bthi", R, z)
        grams = torch.einsum("bthi,bthj->hij", rotated, rotated)
        grams = grams.repeat_interleave(2, 0) if role == "q" else grams.view(2, 2, 12, 12).mean(1)
        found = torch.einsum("tij,hik,tkl->hjl", R, grams, R)
    assert len(found) == heads
    return found / found.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def test_windows_that_are_not_finite_are_dropped_and_counted() -> None:
    # with a q-norm a bad token's gradient is NaN even where nothing depends on it
    good = opened("qwen3", length=LENGTH, windows=2)
    bad = opened("qwen3", length=LENGTH, windows=3)
    hidden = torch.cat([good.call.hidden[:1], bad.call.hidden[1:2], good.call.hidden[1:]])
    hidden[1, 2] = torch.nan
    bad.call = bad.call.at(hidden)
    for role in ("q", "v"):
        options = {"mode": "attn-kron", "estimator": "exact"}
        clean, found = observed(good, role, **options), observed(bad, role, **options)
        assert float(found.sums["dropped"]) == LENGTH
        assert off(found.matrix(), clean.matrix()) < 1e-6
        assert off(found.outer(), clean.outer()) < 1e-6
    for options in ({"mode": "blend"}, {"mode": "layer", "rows": "attention"}):
        for role in ("q", "k", "v"):
            found = observed(bad, role, **options)
            assert found.matrix().isfinite().all()
            assert float(found.sums["dropped"]) == LENGTH


@pytest.mark.parametrize(("name", "role"), [("llama", "gate"), ("llama", "up"), ("gpt2", "up"),
                                            ("opt", "up")])  # fmt: skip
def test_gate_and_up_by_the_jacobian_of_the_mlp(name: str, role: str) -> None:
    block = opened(name, length=LENGTH)
    known = Truth(jacobian_of_run(block, role), 1)
    found = observed(block, role, mode="attn-kron", mlp=True)
    assert off(found.matrix(), known.inner[0]) < 1e-6  # Llama's activation input is exact
    assert off(found.outer(), known.outer) < 1e-6
    error = torch.randn(
        known.full.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = (known.outer[0] @ error @ known.inner[0] * error).sum() / known.inner[0].trace()
    assert float(found.damage(error)) == pytest.approx(float(expected), rel=1e-5)


def test_routed_experts_see_their_own_mlp() -> None:
    block = opened("mixtral", dtype=torch.float32, length=LENGTH)
    path = next(g for g in block.groups if g.kind == "mlp_in").layers["gate"]
    block.paths = {"gate": path, "o": block.paths["o"]}
    known = Truth(jacobian_of_run(block, "gate"), 1)
    found = observed(block, "gate", mode="attn-in", mlp=True)
    assert off(found.matrix(), known.inner[0]) < 1e-5
    assert float(found.sums["weight"]) == len(inputs(block, "gate"))


@pytest.mark.parametrize(("name", "index", "role"), [
    ("deepseek_v3", 0, "q_b_proj"), ("deepseek_v3", 0, "kv_a_proj_with_mqa"),
    ("gpt_neox", 0, "qkv"), ("qwen3_next", 0, "in_proj_qkvz"), ("qwen3_next", 1, "q"),
    ("gpt_oss", 0, "q"),
])  # fmt: skip
def test_the_probe_serves_every_attention(name: str, index: int, role: str) -> None:
    exact = name == "gpt_oss"
    block = opened(name, index, dtype=torch.float32, length=LENGTH)
    known = Truth(jacobian(block, role), 4 if role in ("q", "qkv") else 1)
    found = observed(block, role, mode="attn-kron", probes=600, signs=600)
    assert off(found.matrix(), known.inner.sum(0)) < 0.17
    assert off(found.outer(), known.outer) < 0.17
    if exact:  # sinks have a closed form
        found = observed(block, role, mode="attn-kron", estimator="exact")
        assert off(found.matrix(), known.inner.sum(0)) < 1e-4
    assert observed(block, role, mode="blend").outer() is not None


def test_all_other_layers_are_plain() -> None:
    block = opened("llama", dtype=torch.float32, length=LENGTH)
    for role in ("o", "gate", "up", "down"):
        found = observed(block, role, mode="blend")
        plain = block.observe({role: Hessian()})[role]
        assert torch.equal(found.matrix(), plain.matrix())
        assert found.outer() is None
        assert found.inner() is None
        assert found.tau(7) == pytest.approx(7 * float(plain.matrix().trace()), rel=1e-5)


def test_workers_add_up_and_options_are_the_key() -> None:
    block = opened("llama", length=LENGTH)
    need = AttentionHessian(mode="blend", per_head=True)
    one, two = observed(block, "v", mode="blend", per_head=True), block.observe({"v": need})["v"]
    whole = observed(block, "v", mode="blend", per_head=True, batches=2)
    one.merge(two)
    assert off(one.matrix(), whole.matrix()) < 1e-12
    assert off(one.outer(), whole.outer()) < 1e-12
    fresh = need.start(48, torch.device("cpu"))
    fresh.merge(two)
    assert off(fresh.inner(), two.inner()) < 1e-12
    assert need == fresh
    assert need != AttentionHessian(mode="attn-in", per_head=True)
    factor, _ = one.factor(0.01)
    assert factor is not None
    assert need.nbytes(128) == 4 * 128 * 128 * 4
    with pytest.raises(ValueError, match="mode = 'layer' only"):
        AttentionHessian(mode="blend", rows="attention")


def test_half_precision() -> None:
    for role in ("q", "k", "v"):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            block = opened("qwen3", dtype=dtype, length=LENGTH)
            need = AttentionHessian(mode="blend")
            started = need.start(48, torch.device("cpu"))
            assert started.sums["h"].dtype == torch.float32
            found.append(block.observe({role: need})[role])
        assert found[1].matrix().dtype == torch.float32
        assert off(found[1].matrix(), found[0].matrix()) < 0.2
        assert off(found[1].outer(), found[0].outer()) < 0.2


@dataclass(frozen=True, kw_only=True)
class Looking(Stage):
    """Rounds after asking for the attention's view."""

    hessian: Hessian
    kept: dict[str, tuple[str, Hessian]] = field(default_factory=dict, compare=False)

    def needs(self) -> tuple[Hessian, ...]:
        return (self.hessian,)

    def on_layer(self, layer: Layer) -> Layer:
        grid = layer.target.grid
        assert grid is not None
        self.kept[layer.name] = layer.role, layer.stats[self.hessian]
        scales = fit(layer.residual(), grid)
        layer.parts.append(part_of(snap(layer.residual(), scales, grid), scales, grid))
        return layer


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_walk_collects_it(name: str, tmp_path: Path) -> None:
    model = Model.open(tiny_model(name, tmp_path))
    plan = Plan.uniform(model.shapes, Grid("int4", 16))
    need, plain = AttentionHessian(mlp=name != "gpt2"), Hessian()
    stages = [Looking(hessian=need), Looking(hessian=plain)]
    for stage in stages:
        walked(model, [stage], plan, tmp_path)
    first, other = ({p: x for p, x in stage.kept.items() if ".0." in p} for stage in stages)
    for path, (role, stat) in other.items():
        if role in ("o", "down"):
            assert torch.equal(stat.matrix(), first[path][1].matrix())
    seen = {role for role, stat in first.values() if stat.attentive}
    assert seen == {"q", "k", "v"} | ({"gate", "up"} if need.mlp else set())
    q, k = (next(stat for role, stat in first.values() if role == name) for name in "qk")
    assert not torch.equal(q.matrix(), k.matrix())
    assert not q.empty
    assert q.factor(0.01)[0] is not None
    assert q.outer().shape == (4, 12, 12)
