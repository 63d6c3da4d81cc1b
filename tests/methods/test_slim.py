"""SliM: widths of groups, their storage, and what they gain."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aptq.core.graded import Graded
from aptq.core.grid import Grid
from aptq.core.parts import empty_part, load_part, part_specs
from aptq.core.plan import PartSpec, Plan, Target
from aptq.core.rounding import Scales, fit, snap
from aptq.engine.data import Data
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.engine.stat import Seen
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.recipe import Recipe
from aptq.runtime.load import dense, load
from aptq.stats.hessian import Hessian
from tests.contract.test_methods import ARCHS
from tests.engine.run import windows
from tests.tiny import tiny_model

OUT, IN = 24, 64


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def clustered(rows: int = 400) -> Hessian:
    """Inputs of which some groups of eight are much larger than others."""
    sizes = torch.tensor([8.0, 0.2, 1.0, 1.0, 0.1, 5.0, 1.0, 1.0]).repeat_interleave(8)
    stat = Hessian().start(IN, torch.device("cpu"))
    stat.update(Seen(draw(rows, IN, seed=1) * sizes, None, rows))
    return stat


def layer(text: str) -> Layer:
    stats = {Hessian(): clustered()}
    return Layer("layer", "q", draw(OUT, IN), None, Target.parse(text), stats)


@given(
    bits=st.integers(2, 7),
    group=st.sampled_from([8, 16, 24]),
    pairs=st.integers(0, 3),
    rows=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_widths_come_back_in_the_same_bytes(
    bits: int, group: int, pairs: int, rows: int, seed: int
) -> None:
    grid, generator = Grid(f"int{bits}", group, "int"), torch.Generator().manual_seed(seed)
    widths = torch.tensor([bits - 1] * pairs + [bits + 1] * pairs + [bits] * 2)
    widths = widths[torch.randperm(len(widths), generator=generator)]
    count, columns = len(widths), len(widths) * group
    levels = (2**widths).repeat_interleave(group)
    codes = (torch.rand(rows, columns, generator=generator) * levels).to(torch.uint8)
    zero = (torch.rand(rows, count, generator=generator) * 2**widths).to(torch.uint8)
    scale = torch.rand(rows, count, generator=generator).half()
    part = Graded.make(codes, Scales(scale, zero), widths.tolist(), grid)
    spread = zero.repeat_interleave(group, 1).float()
    level = torch.where(levels == 2, 2 * codes.float() - 1, codes.float() - spread)
    wanted = level * scale.float().repeat_interleave(group, 1)
    assert torch.equal(part.dense(), wanted)
    assert torch.equal(part.rows(rows // 2, rows), wanted[rows // 2 :])
    spec = PartSpec(grid, graded=True)
    assert part.nbytes == spec.nbytes((rows, columns))
    found = {name: (t.dtype, tuple(t.shape)) for name, t in part.tensors().items()}
    assert found == part_specs(spec, (rows, columns))
    assert torch.equal(load_part(spec, part.shape, part.tensors().__getitem__).dense(), wanted)
    assert empty_part(spec, part.shape).nbytes == part.nbytes
    assert Target.parse(str(Target((spec,)))) == Target((spec,))


def test_bad_widths_are_refused() -> None:
    grid = Grid.parse("int3-g8-z")
    scales = Scales(torch.ones(2, 2).half(), torch.zeros(2, 2, dtype=torch.uint8))
    part = Graded.make(torch.zeros(2, 16, dtype=torch.uint8), scales, [2, 4], grid)
    for bad in ([3, 4], [1, 5]):
        held = part.tensors() | {"widths": torch.tensor(bad, dtype=torch.uint8)}
        with pytest.raises(ValueError, match="widths"):
            Graded.load(held, part.meta(), part.shape)
    for text in ("int3-g4-z~", "int3-row-z~", "int3-g8~", "int8-g8-z~", "q4_k~"):
        with pytest.raises(ValueError, match="no part of a weight"):
            Target.parse(text)
    assert not Target.parse("int3-g16-z~").fits((4, 24))


@pytest.mark.parametrize("bits", [2, 3])
def test_mixed_widths_beat_one(bits: int) -> None:
    """On inputs that differ from group to group; the widest go where the inputs are large."""
    losses = {}
    stage = methods.get("slim")()
    for text in (f"int{bits}-g8-z", f"int{bits}-g8-z~"):
        made = stage.on_layer(layer(text))
        losses[text] = stage.objective(made)
    part = made.parts[0]
    assert isinstance(part, Graded)
    widths = part.widths.tolist()
    assert sum(widths) == bits * 8
    assert widths[0] == bits + 1
    assert widths[4] == bits - 1
    assert losses[f"int{bits}-g8-z~"] < 0.8 * losses[f"int{bits}-g8-z"]


def test_the_number_of_groups_is_the_best_of_all() -> None:
    """Against every number, tried by hand."""
    stage, one = methods.get("slim")(), layer("int3-g8-z~")
    H = clustered().metric(stage.damp)  # type: ignore[attr-defined]
    inverse = torch.linalg.inv(H.double()).diagonal()
    salience = (one.weight.double().square() / inverse).float()
    grid = Grid.parse("int3-g8-z")
    found = stage.widths(one.weight, H, salience, grid)  # type: ignore[attr-defined]
    order = salience.view(OUT, 8, 8).sum((0, 2)).argsort().tolist()
    losses = []
    for k in range(5):
        error = torch.zeros_like(one.weight)
        for n in range(8):
            step = -1 if n in order[:k] else 1 if n in order[8 - k :] else 0
            part, width = one.weight[:, 8 * n : 8 * n + 8], Grid(f"int{3 + step}", 0, "int")
            error[:, 8 * n : 8 * n + 8] = part - snap(part, fit(part, width), width)
        losses.append(float(((error @ H) * error).sum()))
    k = losses.index(min(losses))
    assert sorted(found) == sorted([2] * k + [4] * k + [3] * (8 - 2 * k))


@pytest.mark.parametrize("arch", ARCHS)
def test_in_every_family(arch: str, tmp_path: Path) -> None:
    folder = tiny_model(arch, tmp_path / "model", torch.bfloat16)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    stages = (methods.get("slim")(tries=5),)
    recipe = Recipe(stages=stages, budget="", data=Data(source=str(text), samples=3, length=16))
    model = Model.open(folder)
    targets = {}
    for name, shape in model.shapes.items():
        target = Target.parse("int2-g8-z~")
        targets[name] = target if target.fits(shape) else Target()
    plan = Plan(targets)
    done = compress(folder, tmp_path / "run", recipe=recipe, plan=plan)
    assert done.bits == pytest.approx(plan.bits(model.shapes))
    packed, whole = (x(tmp_path / "run", dtype=torch.float32) for x in (load, dense))
    with torch.no_grad():
        one, two = (m(windows(2, 20)).logits for m in (packed, whole))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
