"""Descent as a stage: where it starts, what it leaves alone, that it never loses."""

from dataclasses import replace

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.parts import Dense
from aptq.core.plan import PartSpec, Target
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.methods.quantize.descent import Descent
from aptq.stats.hessian import Hessian
from tests.methods.refine import CPU, layer

GRIDS = ["int2-g16-z", "int3-g16", "int3-g7-fz", "int4-row-z-bf16"]
OPTIONS = [{}, {"mode": "cyclic"}, {"pairs": True}, {"rounds": 0}, {"drift": 1.0}, {"damp": 0.0}]
OPTIONS += [{"rows": "gradient"}, {"first": 0.2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_lowers_what_gptq_and_rounding_left(options: dict[str, object], grid: str) -> None:
    stage = Descent(**options)  # type: ignore[arg-type]
    for after in ("gptq", "rtn"):
        made = layer(grid, stage.needs()[0], after=after)
        before = stage.objective(made)
        made = stage.on_layer(made)
        assert stage.objective(made) < before
        assert len(made.parts) == 1
        assert made.parts[0].grid == Grid.parse(grid)  # type: ignore[attr-defined]


def test_starts_from_nearest_rounding_by_itself() -> None:
    stage = Descent()
    alone = stage.on_layer(layer("int3-g16-z", Hessian()))
    after = stage.on_layer(layer("int3-g16-z", Hessian(), after="rtn"))
    assert torch.equal(alone.dense(), after.dense())


def test_objective_is_the_damped_quadratic_form() -> None:
    stage = Descent(damp=0.1)
    made = layer("int3-g16-z", Hessian(), after="rtn")
    stat = made.stats[Hessian()]
    assert isinstance(stat, Hessian)
    H = stat.matrix().double()
    H += 0.1 * H.diagonal().mean() * torch.eye(40)
    E = made.residual().double()
    assert stage.objective(made) == pytest.approx(float((E @ H @ E.T).trace()), rel=1e-5)


def test_what_is_rounded_makes_up_for_the_drift_of_the_inputs() -> None:
    """With fine steps it comes as near to the target of `gptq` with drift as that does itself."""
    for share in (0.25, 1.0):
        stage = Descent(drift=share)
        need = stage.needs()[0]
        rtn = stage.objective(layer("int8-g8-z", need, after="rtn"))
        gptq = methods.get("gptq")(drift=share)  # type: ignore[call-arg]
        theirs = stage.objective(gptq.on_layer(layer("int8-g8-z", need)))
        ours = stage.objective(stage.on_layer(layer("int8-g8-z", need)))
        both = stage.objective(stage.on_layer(gptq.on_layer(layer("int8-g8-z", need))))
        assert both < theirs
        assert ours < 1.2 * theirs
        assert ours < 0.1 * rtn


def test_dead_inputs_get_zeros_and_keep_them() -> None:
    made = layer("int4-g16-z", Hessian())
    stat = made.stats[Hessian()]
    assert isinstance(stat, Hessian)
    stat.sums["h"][3] = 0
    stat.sums["h"][:, 3] = 0
    Descent().on_layer(made)
    assert made.dense()[:, 3].abs().max() == 0


def test_without_tokens_nothing_moves_and_is_counted() -> None:
    made = layer("int4-g16-z", Hessian(), after="gptq")
    before = made.dense()
    made.stats[Hessian()] = Hessian().start(40, CPU)
    Descent().on_layer(made)
    assert torch.equal(made.dense(), before)
    assert made.counts["fallbacks"] == 1
    made.stats[Hessian()].sums["weight"] += 1
    made.stats[Hessian()].sums["h"][0, 0] = torch.nan
    Descent().on_layer(made)
    assert torch.equal(made.dense(), before)
    assert made.counts["fallbacks"] == 2


def test_sixteen_bits_are_left_alone_and_several_widths_refused() -> None:
    stage, made = Descent(), layer("int4-g16-z", Hessian(), after="gptq")
    dense = Dense(made.weight.bfloat16())
    made.parts = [dense]
    assert stage.on_layer(made).parts == [dense]
    several = replace(made, target=Target.parse("int3-g8-z~"), parts=[])
    several = methods.get("slim")().on_layer(several)
    with pytest.raises(ValueError, match=r"block\.linear"):
        stage.on_layer(several)
    bare = Layer("a", "up", made.weight, None, Target((PartSpec(Grid("bf16")),)), made.stats)
    assert torch.equal(stage.on_layer(bare).dense(), made.weight.bfloat16().float())


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_codes_move_beside_outliers_and_factors(drift: float) -> None:
    stage = Descent(drift=drift)
    made = layer("int3-g16-z", stage.needs()[0])
    made = replace(made, target=Target.parse("int3-g16-z+o5%+r2"))
    for name, options in (("spqr", {}), ("gptq", {"drift": drift}), ("eora", {"drift": drift})):
        made = methods.get(name)(**options).on_layer(made)
    codes, *others = made.parts
    before = stage.objective(made)
    made = stage.on_layer(made)
    assert stage.objective(made) < before
    assert made.parts[0] is not codes
    assert made.parts[1:] == others
    stat = made.stats[stage.needs()[0]]
    assert isinstance(stat, Hessian)
    error = made.dense() - stat.target(made.weight, drift)
    loss = float(((error @ stat.metric(stage.damp)) * error).sum())
    assert stage.objective(made) == pytest.approx(loss, rel=1e-4)
    with_only_outliers = replace(made, target=Target.parse("int3-g16-z+o5%"), parts=others[:1])
    assert [x.kind for x in stage.on_layer(with_only_outliers).parts] == ["quantized", "sparse"]


@pytest.mark.parametrize("options", [{"sweeps": 0}, {"rounds": -1}, {"damp": -1.0}, {"drift": 2.0}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="descent: an option is out of range"):
        Descent(**options)  # type: ignore[arg-type]
