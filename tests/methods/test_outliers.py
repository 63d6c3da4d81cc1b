"""Single weights in 16 bits: how many, which, and what they save."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from aptq.core.parts import Sparse
from aptq.core.plan import Plan, Target
from aptq.core.scores import Scores
from aptq.engine.candidate import errors
from aptq.engine.data import Data, tokens
from aptq.engine.layer import Layer
from aptq.engine.stage import methods
from aptq.methods.sparse.spqr import SpQR
from aptq.model.model import Model
from aptq.pipeline import compress
from aptq.recipe import Recipe
from aptq.runtime.load import dense, load
from aptq.stats.hessian import Hessian
from aptq.stats.marked import largest
from aptq.store.checkpoint import Checkpoint
from tests.contract.test_methods import ARCHS
from tests.engine.run import windows
from tests.methods.test_lowrank import IN, OUT, draw, hessian, inputs
from tests.tiny import tiny_model


def layer(text: str, x: Tensor) -> Layer:
    weight = draw(OUT, IN).bfloat16().float()
    return Layer("layer", "q", weight, None, Target.parse(text), {Hessian(): hessian(x)})


def test_exactly_so_many_and_ties_by_place() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0], [3.0, 0.0, 5.0]])
    assert largest(score, 3).tolist() == [[False, True, True], [False, False, True]]
    assert largest(score, 0).sum() == 0


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_outliers_lower_the_loss(quantizer: str) -> None:
    """By sensitivity better than as many by magnitude, and both better than none."""
    x = inputs(400)
    H = hessian(x).matrix()
    found = {}
    for text in ("int2-g8-z", "int2-g8-z+o2%", "int2-g8-z+o10%"):
        one = SpQR().on_layer(layer(text, x))
        made = methods.get(quantizer)().on_layer(one)
        error = made.residual()
        found[text] = float((error @ H * error).sum())
        assert len(made.parts) == len(made.target.parts)
    assert found["int2-g8-z+o10%"] < found["int2-g8-z+o2%"] < found["int2-g8-z"]


def test_kept_weights_are_what_they_were() -> None:
    """Rounding to nearest behind it leaves 0 there."""
    one = SpQR().on_layer(layer("int3-g8-z+o5%", inputs(400)))
    made = methods.get("rtn")().on_layer(one)
    codes, kept = made.parts
    assert isinstance(kept, Sparse)
    mask = kept.mask()
    assert int(mask.sum()) == 5 * OUT * IN // 100
    assert not codes.dense()[mask].any()
    assert torch.equal(made.dense()[mask], made.weight[mask])


def test_the_score_is_that_of_the_inverse() -> None:
    one = layer("int2-g8-z", inputs(400))
    score = SpQR(damp=0.01, clip=1.0).score(one)
    H = hessian(inputs(400)).matrix().double()
    H += 0.01 * H.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    wrong = methods.get("rtn")().on_layer(layer("int2-g8-z", inputs(400))).residual()
    wanted = wrong.double().square() / torch.linalg.inv(H).diagonal()
    assert score is not None
    torch.testing.assert_close(score.double(), wanted, rtol=1e-3, atol=1e-6)


TEXTS = ["int2-g8-z", "int2-g8-z+r2", "int2-g8-z+o3%", "int2-g8-z+o3%+r2", "int3-g8-z", "bf16"]


@pytest.mark.parametrize("names", [("spqr", "gptq", "eora"), ("spqr", "rtn", "svd")])
def test_errors_of_candidates_are_those_of_the_stages(names: tuple[str, ...]) -> None:
    """Work is shared between candidates, results are not changed by it."""
    one, targets = layer("int2-g8-z", inputs(400)), [Target.parse(text) for text in TEXTS]
    stages = [methods.get(name)() for name in names]
    for target, found in zip(targets, errors(one, targets, stages), strict=True):
        wanted = replace(one, target=target, parts=[])
        for stage in stages if target != targets[-1] else []:
            stage.on_layer(wanted)
        made = wanted.dense() if wanted.parts else one.weight
        torch.testing.assert_close(found, made - one.weight, rtol=1e-4, atol=1e-4)


def test_bits_rank_and_outliers_are_chosen_together(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model", torch.bfloat16)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    recipe = Recipe.parse(
        """
grids = ["int2-g16-z", "int2-g16-z+o2%", "int2-g16-z+r2", "int3-g16-z", "int3-g16-z+o1%+r1"]
budget = "4.5bpw"
measure = {use = "fisher"}
allocate = {use = "milp"}
stage = [{use = "spqr"}, {use = "gptq"}, {use = "eora"}]
""",
        "here",
    )
    data = Data(source=str(text), samples=4, length=16)
    done = compress(folder, tmp_path / "run", recipe=replace(recipe, data=data))
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert done.bits <= 4.5
    kinds = {part.kind for target in plan.targets.values() for part in target.parts}
    assert kinds > {"quantized"}
    assert load(tmp_path / "run") is not None
    assert Recipe.parse(recipe.text(), "again") == recipe


@pytest.mark.parametrize("arch", ARCHS)
def test_all_parts_in_every_family(arch: str, tmp_path: Path) -> None:
    folder = tiny_model(arch, tmp_path / "model", torch.bfloat16)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    stages = tuple(methods.get(name)() for name in ("spqr", "gptq", "eora"))
    recipe = Recipe(stages=stages, budget="", data=Data(source=str(text), samples=3, length=16))
    model = Model.open(folder)
    plan = Plan(dict.fromkeys(model.shapes, Target.parse("int3-g16-z+o1.5%+r2")))
    done = compress(folder, tmp_path / "run", recipe=recipe, plan=plan)
    assert done.bits == pytest.approx(plan.bits(model.shapes))
    packed = load(tmp_path / "run", kernel="reference", dtype=torch.float32)
    fast = load(tmp_path / "run", dtype=torch.float32)
    whole = dense(tmp_path / "run", dtype=torch.float32)
    ids = windows(2, 20)
    with torch.no_grad():
        one, two, three = (m(ids).logits for m in (packed, fast, whole))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two, three, rtol=1e-3, atol=1e-4)


def gradients(folder: Path, text: Path, name: str, share: str) -> dict[str, Tensor]:
    """Run `name` and rtn on a tiny model; the places that it kept, by layer."""
    stages = (methods.get(name)(), methods.get("rtn")())
    recipe = Recipe(stages=stages, budget="", data=Data(source=str(text), samples=3, length=16))
    plan = Plan(dict.fromkeys(Model.open(folder).shapes, Target.parse(f"int3-g16-z+o{share}%")))
    out = text.parent / f"{name}{share}"
    compress(folder, out, recipe=recipe, plan=plan)
    stored, found = Checkpoint.open(out), {}
    for layer in stored.plan.targets:
        (part,) = (part for part in stored.layer(layer) if isinstance(part, Sparse))
        found[layer] = part.mask()
    return found


@pytest.mark.parametrize("name", ["gwq", "tacq"])
def test_places_are_those_of_autograd(name: str, tmp_path: Path) -> None:
    """sum over windows of |dL / dW|, by plain autograd on the whole model in float32."""
    folder = tiny_model("llama", tmp_path / "model", torch.float32)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    found = gradients(folder, text, name, "4")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = Model.open(folder)
    ids = tokens(Data(source=str(text), samples=3, length=16), source.tokenizer).ids
    sizes = {layer: torch.zeros(shape) for layer, shape in source.shapes.items()}
    for window in ids:
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        for layer, size in sizes.items():
            grad = model.get_parameter(f"{layer}.weight").grad
            assert grad is not None
            size += grad.abs()
    for layer, size in sizes.items():
        if name == "tacq":
            W = model.get_parameter(f"{layer}.weight").detach()
            wrong = methods.get("rtn")().on_layer(
                Layer(layer, "q", W, None, Target.parse("int3-g16-z"))
            )
            size = size * wrong.residual().abs() * W.abs()
        wanted = largest(size, int(found[layer].sum()))
        assert int((wanted & found[layer]).sum()) >= 0.98 * int(wanted.sum()), layer


def test_measure_circuit_prefers_kept_weights(tmp_path: Path) -> None:
    """More outliers weigh less; the sum is that of the definition for one layer."""
    folder = tiny_model("llama", tmp_path / "model", torch.float32)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    recipe = Recipe.parse(
        """
grids = ["int3-g16-z", "int3-g16-z+o1%", "int3-g16-z+o5%"]
budget = "5.2bpw"
measure = {use = "circuit"}
allocate = {use = "milp"}
stage = [{use = "tacq"}, {use = "rtn"}]
""",
        "here",
    )
    data = Data(source=str(text), samples=3, length=16)
    compress(folder, tmp_path / "run", recipe=replace(recipe, data=data))
    scores = Scores.load(tmp_path / "run" / "scores.json")
    for losses in scores.losses.values():
        assert losses[0] > losses[1] > losses[2] > 0
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert len({str(target) for target in plan.targets.values()}) > 1
