"""GPTQ as a stage: its objective, its orders, its fallbacks."""

from dataclasses import replace

import pytest
import torch

from aptq.core.grid import Grid
from aptq.core.order import error_weights, visiting_order
from aptq.core.plan import PartSpec, Target
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.stat import Seen
from aptq.methods.quantize import gptq
from aptq.methods.quantize.gptq import GPTQ
from aptq.stats.hessian import Hessian

CPU = torch.device("cpu")


def layer(
    grid: str, *, out: int = 24, columns: int = 40, tokens: int = 200, seed: int = 0
) -> Layer:
    """A layer with correlated inputs of uneven size, its plain second moment collected."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.exp(torch.randn(columns, generator=generator))
    x = (torch.randn(tokens, columns, generator=generator) @ mix + 0.3) * size
    W = torch.randn(out, columns, generator=generator)
    made = Layer("block.linear", "up", W, None, Target((PartSpec(Grid.parse(grid)),)))
    stat = Hessian().start(columns, CPU)
    stat.update(Seen(x, torch.arange(tokens), tokens))
    made.stats[Hessian()] = stat
    return made


def done(stage: GPTQ, made: Layer) -> float:
    return stage.objective(stage.on_layer(made))


OPTIONS = [
    {},
    {"columns": "natural"},
    {"columns": "natural", "groups": "dynamic"},
    {"columns": "grouped", "groups": "dynamic"},
    {"clip": 0.5},
    {"clip": 0.5, "columns": "grouped", "groups": "dynamic", "importance": "diagonal"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", ["int3-g16-z", "int4-row", "int2-g7-z", "int4-g16-fz"])
def test_beats_rounding_to_nearest(options: dict[str, object], grid: str) -> None:
    stage = GPTQ(**options)  # type: ignore[arg-type]
    rtn = methods.get("rtn")()
    ours = theirs = 0.0
    for seed in range(8):
        ours += done(stage, layer(grid, seed=seed))
        theirs += stage.objective(rtn.on_layer(layer(grid, seed=seed)))
    assert ours < 0.9 * theirs


def test_each_option_pays_on_uneven_inputs() -> None:
    """Mean over 8 seeds at 2 bits: clip search and cost weights lower the objective."""

    def mean(**options: object) -> float:
        stage = GPTQ(**options)  # type: ignore[arg-type]
        return sum(done(stage, layer("int2-g8-z", seed=s)) for s in range(8)) / 8

    plain = mean()
    assert mean(clip=0.5) < plain
    assert mean(columns="activation") < mean(columns="natural")


def test_stored_values_are_what_was_swept() -> None:
    """The part's codes decode to the rounded weights, not to a second rounding of them."""
    stage = GPTQ(clip=0.5)
    made = layer("int3-g16-z")
    grid = made.target.grid
    assert grid is not None
    problem = stage.prepare(made, grid)
    assert problem is not None
    rounded, _ = stage.compensate(made, problem, grid)
    assert torch.equal(stage.on_layer(made).dense(), rounded)


def test_no_tokens_falls_back_and_is_counted() -> None:
    made, same = layer("int4-g16-z"), layer("int4-g16-z")
    made.stats[Hessian()] = Hessian().start(40, CPU)
    GPTQ().on_layer(made)
    assert made.counts["fallbacks"] == 1
    methods.get("rtn")().on_layer(same)
    assert torch.equal(made.dense(), same.dense())


def test_few_tokens_stay_finite_and_not_worse_than_rtn() -> None:
    made, same = layer("int4-g16-z", tokens=5), layer("int4-g16-z", tokens=5)
    stage = GPTQ()
    assert done(stage, made) <= stage.objective(methods.get("rtn")().on_layer(same))
    assert made.dense().isfinite().all()


def test_dead_columns_become_zero() -> None:
    made = layer("int4-g16-z")
    stat = made.stats[Hessian()]
    assert isinstance(stat, Hessian)
    stat.sums["h"][3] = 0
    stat.sums["h"][:, 3] = 0
    GPTQ().on_layer(made)
    assert made.counts["dead"] == 1
    assert made.dense()[:, 3].abs().max() == 0


def test_visiting_orders() -> None:
    diagonal = torch.tensor([1.0, 9.0, 2.0, 2.0, 5.0, 0.0, 7.0])
    grid = Grid("int4", 3, "int")
    assert visiting_order(diagonal, grid, "natural").tolist() == list(range(7))
    assert visiting_order(diagonal, grid, "activation").tolist() == [1, 6, 4, 2, 3, 0, 5]
    assert visiting_order(diagonal, grid, "grouped").tolist() == [1, 2, 0, 6, 4, 3, 5]
    whole = replace(grid, group=0)
    assert visiting_order(diagonal, whole, "grouped").tolist() == [1, 6, 4, 2, 3, 0, 5]


def test_conditional_weights_are_the_cost_of_an_error() -> None:
    """1 / U_jj^2 = min over later columns of e H e^T for a unit error in column j."""
    made = layer("int4-g16-z", columns=6)
    stat = made.stats[Hessian()]
    assert isinstance(stat, Hessian)
    order = torch.tensor([2, 0, 5, 1, 3, 4])
    factor, _ = stat.factor(0.01, order)
    assert factor is not None
    found = error_weights(stat.matrix(), factor.inner, order, "conditional")
    assert found is not None
    H = stat.matrix().double()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(6)
    for position, column in enumerate(order.tolist()):
        later = order[position + 1 :]
        best = H[column, column]
        if len(later):
            cross = H[column, later]
            best = best - cross @ torch.linalg.solve(H[later][:, later], cross)
        assert float(found[column]) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"clip": 0.0}, {"damp": -1.0}, {"first": 1.0}, {"columns": "activation", "groups": "dynamic"}],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="gptq"):
        GPTQ(**options)  # type: ignore[arg-type]


def test_attempts_are_what_the_layer_would_become() -> None:
    """Candidates are swept together; each equals what on_layer makes of it alone."""
    for stage in (GPTQ(), GPTQ(columns="natural", groups="dynamic"), GPTQ(pull=0.3)):
        made = layer("int4-g16-z")
        targets = [Target.parse(t) for t in ("int2-g8-z", "int3-row", "int4-g16-z", "int8-g8-z")]
        together = list(stage.attempt(made, targets))
        assert not made.parts
        for target, found in zip(targets, together, strict=True):
            alone = stage.on_layer(replace(made, target=target, parts=[])).dense()
            assert torch.allclose(found, alone, atol=1e-5)


def test_drift_moves_the_output_towards_that_of_the_original() -> None:
    """With x0 the original inputs and x those at hand, |W x0 - Q x|^2 falls, at fine rounding."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(512, 40, generator=generator)
    x = x0 + 0.3 * torch.randn(512, 40, generator=generator)
    losses = []
    for drift in (0.0, 0.25, 1.0):
        made, stage = layer("int8-g8-z"), GPTQ(drift=drift)
        need = stage.needs()[0]
        stat = need.start(40, CPU)
        stat.update(Seen(x, torch.arange(512) % 32, 32, original=x0))
        made.stats = {need: stat}
        q = stage.on_layer(made).dense()
        losses.append(float((x0 @ made.weight.T - x @ q.T).square().sum()))
    assert losses[2] < losses[1] < losses[0]
    ideal = torch.linalg.lstsq(x, x0 @ made.weight.T).solution
    best = float((x0 @ made.weight.T - x @ ideal).square().sum())
    assert losses[2] < best + 0.2 * (losses[0] - best)


def test_pull_shrinks_the_compensation() -> None:
    """FOEM: a higher objective, nearer weights; all of it is rounding to nearest."""
    for stage in (GPTQ(pull=0.0), GPTQ(columns="natural", groups="dynamic", pull=0.0)):
        assert torch.equal(
            stage.on_layer(layer("int3-g8-z")).dense(),
            replace(stage, pull=1e-12).on_layer(layer("int3-g8-z")).dense(),
        )
    losses, away = [], []
    for pull in (0.0, 0.2, 0.6):
        made = layer("int3-g8-z")
        losses.append(done(GPTQ(pull=pull), made))
        away.append(made.error())
    assert losses == sorted(losses)
    assert away == sorted(away, reverse=True)
    made, same = layer("int3-g8-z"), layer("int3-g8-z")
    GPTQ(pull=1.0).on_layer(made)
    methods.get("rtn")().on_layer(same)
    assert torch.equal(made.dense(), same.dense())
    with pytest.raises(ValueError, match="pull = 0"):
        GPTQ(pull=0.1, hessian="attn-in")
    with pytest.raises(ValueError, match="out of range"):
        GPTQ(pull=1.5)


@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.5, "pull": 0.1}, {"columns": "natural"}], ids=str
)
def test_layers_of_one_input_are_swept_together(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, shared, sweeps = GPTQ(**options), layer("int4-row"), list[int]()  # type: ignore[arg-type]
    plain = gptq.sweep

    def counted(weight: torch.Tensor, *rest: object, **more: object) -> object:
        sweeps.append(len(weight))
        return plain(weight, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gptq, "sweep", counted)
    texts = ("int3-g16-z", "int4-row", "int2-g7-fz")
    found = []
    for room in (1 << 30, 0):
        monkeypatch.setattr(gptq, "stack_bytes", lambda _device, room=room: room)
        layers = [
            replace(layer(text, seed=3 + n), stats=shared.stats) for n, text in enumerate(texts)
        ]
        found.append(stage.on_group(layers))
        shared.stats[Hessian()].forget()
    rows = len(shared.weight)
    assert sweeps == [3 * rows, rows, rows, rows]
    for one, other in zip(*found, strict=True):
        assert (one.dense() == other.dense()).float().mean() > 0.999
        assert one.parts[0].meta() == other.parts[0].meta()
        assert one.counts == other.counts


def test_layers_with_other_inputs_are_swept_alone() -> None:
    stage = GPTQ()
    for text in ("int3-g16-z", "bf16"):
        layers = [layer("int3-g16-z"), layer(text, seed=1)]
        alone = [stage.on_layer(replace(x, parts=[])).dense() for x in layers]
        for one, other in zip(stage.on_group(layers), alone, strict=True):
            assert torch.equal(one.dense(), other)
