"""EoRA and SVD: the identities of their specification, and runs with sums of parts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aptq.core.factors import best_part, identity_root, metric_root, spectrum
from aptq.core.parts import LowRank
from aptq.core.plan import PartSpec, Plan, Target
from aptq.engine.data import Data
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.stat import Seen
from aptq.methods.lowrank.eora import EoRA
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.recipe import Recipe
from aptq.runtime.load import dense, load
from aptq.stats.hessian import Hessian
from tests.contract.test_methods import ARCHS
from tests.engine.run import windows
from tests.tiny import tiny_model

OUT, IN = 24, 40


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int) -> Tensor:
    """Correlated inputs [rows, in] of very different sizes."""
    return draw(rows, IN, seed=1) @ draw(IN, IN, seed=2) * torch.logspace(-2, 1, IN)


def hessian(x: Tensor) -> Hessian:
    stat = Hessian().start(IN, torch.device("cpu"))
    stat.update(Seen(x, None, len(x)))
    return stat


def layer(text: str, x: Tensor | None = None) -> Layer:
    stats = {} if x is None else {Hessian(): hessian(x)}
    return Layer("layer", "q", draw(OUT, IN), None, Target.parse(text), stats)


@pytest.mark.parametrize("rank", [1, 4, 16, OUT])
@pytest.mark.parametrize("rows", [400, 12])
def test_error_is_the_tail_of_the_spectrum(rank: int, rows: int) -> None:
    """In float64, with fewer inputs than columns too; rank = out leaves nothing on their span."""
    x, error = inputs(rows).double(), draw(OUT, IN).double()
    H = x.T @ x / rows
    values, vectors = torch.linalg.eigh(H)
    live = values > values[-1] * IN * torch.finfo(torch.float32).eps
    root = vectors[:, live] * values[live].sqrt()
    wanted = torch.linalg.svdvals(error @ root)[rank:].square().sum()
    found = metric_root(H.float())
    parts = spectrum(error.float(), found)
    left = parts.left[:, :rank] * parts.values[:rank]
    rest = error.float() - left @ parts.right[:rank]
    got = (rest @ H.float() * rest).sum()
    whole = float((error @ H * error).sum())
    assert float(got) == pytest.approx(float(wanted), abs=1e-4 * whole)


def test_cholesky_gives_the_same_product() -> None:
    x, error = inputs(400), draw(OUT, IN)
    H = (x.T @ x / 400).double()
    lower = torch.linalg.cholesky(H)
    u, s, v = torch.linalg.svd(error.double() @ lower, full_matrices=False)
    wanted = (u[:, :5] * s[:5]) @ torch.linalg.solve_triangular(
        lower, v[:5], upper=False, left=False
    )
    found = spectrum(error, metric_root(H.float()))
    got = (found.left[:, :5] * found.values[:5]) @ found.right[:5]
    # in the metric: what inputs hardly reach is any
    assert float(((got - wanted) @ lower).norm() / (wanted @ lower).norm()) < 2e-3


def test_identity_is_plain_svd_and_diagonal_scales_columns() -> None:
    error, scale = draw(OUT, IN), torch.logspace(-1, 1, IN)
    for diagonal in (torch.ones(IN), scale):
        u, s, v = torch.linalg.svd(error * diagonal.sqrt(), full_matrices=False)
        wanted = (u[:, :3] * s[:3]) @ v[:3] / diagonal.sqrt()
        found = spectrum(error, metric_root(diagonal.diag()))
        got = (found.left[:, :3] * found.values[:3]) @ found.right[:3]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["r6", "r6@int8-row", "r6@int4-g8-z"])
def test_eora_beats_svd_on_outputs_and_both_beat_nothing(text: str) -> None:
    x = inputs(400)
    found = {}
    for name in ("rtn", "svd", "eora"):
        made = methods.get(name)().on_layer(layer(f"int2-g8-z+{text}", x))
        found[name] = float((x @ made.residual().T).square().sum())
        assert made.dense().isfinite().all()
    assert found["eora"] < found["svd"] < found["rtn"]


def test_rank_deficient_inputs_stay_finite_in_16_bits() -> None:
    x = inputs(12)
    x[:, 3] = 0  # never seen
    made = EoRA().on_layer(layer("int2-g8-z+r8", x))
    part = made.parts[1]
    assert isinstance(part, LowRank)
    for factor in part.factors():
        assert factor.half().isfinite().all()


def test_no_error_no_factors() -> None:
    one = layer("bf16+r4", inputs(100))
    one.weight = one.weight.bfloat16().float()
    made = EoRA().on_layer(one)
    assert not made.parts[1].dense().any()


def test_more_ranks_less_error() -> None:
    x = inputs(400)
    losses = []
    for rank in (1, 2, 4, 8, 16):
        stage = EoRA()
        losses.append(stage.objective(stage.on_layer(layer(f"int2-g8-z+r{rank}", x))))
    assert losses == sorted(losses, reverse=True)


def test_candidates_share_what_they_have_in_common() -> None:
    """`extend` makes what `on_layer` makes, for every rank."""
    x, stage = inputs(400), EoRA()
    one = layer("int3-g8-z", x)
    base = methods.get("rtn")().on_layer(replace(one, parts=[])).dense()
    texts = ["int3-g8-z", "int3-g8-z+r3", "int3-g8-z+r9@int8-row"]
    targets = [Target.parse(text) for text in texts]
    for target, found in zip(targets, stage.extend(one, base, targets), strict=True):
        wanted = stage.on_layer(replace(one, target=target, parts=[])).dense()
        torch.testing.assert_close(found, wanted)


def test_a_rounded_factor_is_made_up_for() -> None:
    """The left factor is solved for again: better than rounding both."""
    x, error = inputs(400), draw(OUT, IN)
    H, spec = x.T @ x / 400, PartSpec.parse("r8@int4-g8-z")
    found = spectrum(error, metric_root(H))
    scale = found.values[:8].sqrt()
    plain = LowRank.make(found.left[:, :8] * scale, scale[:, None] * found.right[:8], spec)
    ours = best_part(error, found, spec, H)

    def loss(part: LowRank) -> float:
        rest = error - part.dense()
        return float((rest @ H * rest).sum())

    assert loss(ours) < loss(plain)
    near = best_part(error, spectrum(error, identity_root(IN, H.device)), spec, None)
    assert float((error - near.dense()).square().sum()) < float(error.square().sum())


@pytest.mark.parametrize("arch", ARCHS)
def test_sums_in_every_family(arch: str, tmp_path: Path) -> None:
    """gptq and eora: bytes as planned, packed runs as dense, and factors help."""
    folder = tiny_model(arch, tmp_path / "model", torch.bfloat16)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    stages = (methods.get("gptq")(), methods.get("eora")())
    data = Data(source=str(text), samples=3, length=16)
    recipe = Recipe(stages=stages, budget="", data=data)
    model = Model.open(folder)
    plan = Plan(dict.fromkeys(model.shapes, Target.parse("int3-g16-z+r2@int8-row")))
    done = compress(folder, tmp_path / "run", recipe=recipe, plan=plan)
    assert done.bits == pytest.approx(plan.bits(model.shapes))
    packed = load(tmp_path / "run", kernel="reference", dtype=torch.float32)
    fast, whole = (
        load(tmp_path / "run", dtype=torch.float32),
        dense(tmp_path / "run", dtype=torch.float32),
    )
    ids = windows(2, 20)
    with torch.no_grad():
        one, two, three = (m(ids).logits for m in (packed, fast, whole))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two, three, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("codes", ["nearest", "compensated"])
@pytest.mark.parametrize("weights", ["hessian", "diagonal"])
def test_turns_never_end_above_one_turn(codes: str, weights: str) -> None:
    """In the stage's own metric; factors of a rank against none."""
    x = inputs(400)
    losses = []
    for rounds, text in ((1, "int2-g8-z"), (1, "int2-g8-z+r4"), (10, "int2-g8-z+r4")):
        stage = methods.get("lqlora")(rounds=rounds, codes=codes, weights=weights)
        made = stage.on_layer(layer(text, x))
        losses.append(stage.objective(made))
        assert [part.meta()["type"] for part in made.parts][1:] == ["lowrank"] * (len(text) > 9)
    assert losses[2] <= losses[1] < losses[0]


def test_turns_leave_outliers_where_they_are() -> None:
    x = inputs(400)
    losses = []
    for rounds in (1, 10):
        stage = methods.get("lqlora")(rounds=rounds)
        made = methods.get("spqr")().on_layer(layer("int2-g8-z+o5%+r4", x))
        (outliers,) = made.parts
        made = stage.on_layer(made)
        losses.append(stage.objective(made))
        assert [part.kind for part in made.parts] == ["quantized", "sparse", "lowrank"]
        assert made.parts[1] is outliers
    assert losses[1] <= losses[0]
    plain = methods.get("lqlora")().on_layer(layer("int2-g8-z+r4", x))
    assert losses[1] < methods.get("lqlora")().objective(plain)


def test_whole_rank_leaves_rounding_of_the_factors_alone() -> None:
    stage = methods.get("lqlora")(rounds=1)
    one = layer(f"int2-g8-z+r{OUT}", inputs(400))
    nothing = float((one.weight.square()).sum())
    assert stage.objective(stage.on_layer(one)) < 1e-3 * stage.objective(
        methods.get("rtn")().on_layer(layer("int2-g8-z", inputs(400)))
    )
    assert float(one.residual().square().sum()) < nothing
