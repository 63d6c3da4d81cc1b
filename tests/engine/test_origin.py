"""The original beside the compressed model: a walk shows both inputs of a layer, row by row."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor, nn

from aptq.core.grid import Grid
from aptq.core.plan import Plan, Target
from aptq.engine.origin import Origin
from aptq.engine.stage import Stage
from aptq.engine.stat import Seen, Stat
from aptq.engine.stream import Stream, Where, open_stream
from aptq.methods.quantize.gptq import GPTQ
from aptq.model.model import Model
from tests.engine.run import walked, windows
from tests.tiny import tiny_model


@dataclass(frozen=True, kw_only=True)
class Pairs(Stat):
    """Keeps the inputs at hand and those of the original."""

    compares = True  # type: ignore[assignment]
    pairs: list[tuple[Tensor, Tensor | None]] = field(default_factory=list, compare=False)

    def start(self, columns: int, device: torch.device) -> Self:
        return type(self)()

    def update(self, seen: Seen) -> None:
        before = None if seen.original is None else seen.original.clone()
        self.pairs.append((seen.x.clone(), before))

    def merge(self, other: Self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def forget(self) -> None: ...

    def nbytes(self, columns: int) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Look(Stage):
    """Looks only."""

    def needs(self) -> tuple[Stat, ...]:
        return (Pairs(),)


def inputs(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """Inputs of every linear of the uncompressed model, by a plain forward."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    found: dict[str, Tensor] = {}
    for name in model.shapes:
        whole.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: args[0].flatten(0, 1)})
        )
    with torch.inference_mode():
        whole(ids, use_cache=False)
    return found


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_original_inputs_are_those_of_the_uncompressed_model(where: Where, tmp_path: Path) -> None:
    model = Model.open(tiny_model("llama", tmp_path / "model", torch.float32))
    plan, ids = Plan.uniform(model.shapes, Grid.parse("int2-g16-z")), windows(5)
    # Look comes first, so that it sees a block before GPTQ changes it
    done = walked(model, [Look(), GPTQ()], plan, tmp_path, ids=ids, where=where)
    wanted, moved = inputs(model, ids), False
    for name, layer in done.layers.items():
        if Pairs() not in layer.stats:  # dropped behind a changed group
            continue
        stat = layer.stats[Pairs()]
        assert isinstance(stat, Pairs)
        x, before = (torch.cat([p[i] for p in stat.pairs if p[i] is not None]) for i in (0, 1))
        torch.testing.assert_close(before, wanted[name], rtol=1e-4, atol=1e-5)
        moved |= not torch.allclose(x, before, atol=1e-3)
    assert moved
    assert not list(tmp_path.glob("original*"))


def test_drift_brings_outputs_nearer_to_the_original(tmp_path: Path) -> None:
    """|W x0 - Q x|^2 of the second block's q, k and v falls when the drift is made up for."""
    model = Model.open(tiny_model("llama", tmp_path / "model", torch.float32))
    grids = {n: "int2-g16-z" if ".layers.0." in n else "int8-g16-z" for n in model.shapes}
    plan = Plan({name: Target.parse(grid) for name, grid in grids.items()})
    errors = []
    for drift in (0.0, 0.5):
        done = walked(model, [Look(), GPTQ(drift=drift)], plan, tmp_path, ids=windows(64))
        total = 0.0
        for role in "qkv":
            layer = done.layers[f"model.layers.1.self_attn.{role}_proj"]
            stat = layer.stats[Pairs()]
            assert isinstance(stat, Pairs)
            for x, before in stat.pairs:
                assert before is not None
                lost = before @ layer.weight.T - x @ layer.dense().T
                total += float(lost.square().sum())
        errors.append(total)
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(("where", "times"), [("memory", 1), ("disk", 2)])
def test_what_leaves_an_original_block_is_computed_once(
    where: Where, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it can be kept beside what entered; the results are the same (tests above)."""
    model = Model.open(tiny_model("llama", tmp_path / "model", torch.float32))
    plan, advance, calls = Plan.uniform(model.shapes, Grid.parse("int4-g16-z")), Stream.advance, []

    def counted(self: Stream, index: int, block: nn.Module) -> None:
        calls.append(index)
        advance(self, index, block)

    monkeypatch.setattr(Stream, "advance", counted)
    walked(model, [GPTQ(drift=0.5)], plan, tmp_path, ids=windows(5), where=where)
    assert len(calls) == times * (model.blocks - 1)


def test_a_part_of_the_windows_is_not_enough(tmp_path: Path) -> None:
    model = Model.open(tiny_model("llama", tmp_path / "model", torch.float32))
    how = {"device": torch.device("cpu"), "folder": tmp_path, "where": "memory", "batch": 2}
    stream = open_stream(model, windows(5), **how)  # type: ignore[arg-type]
    twin, module = stream.twin(), model.load(0)
    origin = Origin(0, model.block_name(0), module, stream)
    origin.inputs(slice(0, 2), [])
    origin.advance()
    twin.advance(0, module)
    assert torch.equal(stream.hidden, twin.hidden)
