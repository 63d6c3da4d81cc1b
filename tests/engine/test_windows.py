"""Blocks that are tuned together: who sees what, who is finished when, and what is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.core.profile import Profiles
from aptq.engine.block import Block
from aptq.engine.knobs import Knobs
from aptq.engine.reconstruct import Reconstruct, shares
from aptq.engine.stage import Stage, methods
from aptq.engine.stream import Stream, open_stream
from aptq.engine.walk import walk
from aptq.engine.window import Window, batch_of, held_out
from aptq.methods.quantize.gptq import GPTQ
from aptq.methods.reconstruct.autoround import AutoRound
from aptq.methods.reconstruct.efficientqat import EfficientQAT
from aptq.model.model import Model
from tests.engine.run import CPU, loaded, windows
from tests.tiny import TINY, tiny_tokenizer

from transformers import AutoModelForCausalLM  # isort: skip

GRID = Grid.parse("int2-g16-z")


def deep(name: str, folder: Path, blocks: int) -> Path:
    """A tiny model of so many blocks."""
    config = TINY[name]()
    config.num_hidden_layers = blocks
    kinds = config.to_dict().get("layer_types")
    if kinds:
        config.layer_types = (kinds * blocks)[:blocks]
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in network.parameters():
            if tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep("llama", tmp_path_factory.mktemp("deep"), 4)


@dataclass
class Run:
    """What a walk has done."""

    stored: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    stream: Stream | None = None


def entering(source: Path, folder: Path) -> Stream:
    """What enters block 0."""
    return open_stream(
        Model.open(source), windows(6, 12), device=CPU, folder=folder, where="memory"
    )


def run(
    source: Path,
    stages: Sequence[Stage],
    folder: Path,
    where: str = "memory",
    profiles: Profiles | None = None,
) -> Run:
    model = Model.open(source)
    stream = open_stream(model, windows(6, 12), device=CPU, folder=folder, where=where)  # type: ignore[arg-type]
    done = Run(stream=stream)

    def sink(block: Block) -> None:
        done.finished.append(block.index)
        done.stored.update({name: value.clone() for name, value in block.stored().items()})
        done.records += block.records

    plan = Plan.uniform(model.shapes, GRID)
    walk(model, stream, stages, plan, sink=sink, profiles=profiles)
    return done


def equal(one: Run, two: Run) -> bool:
    same = one.stored.keys() == two.stored.keys()
    return same and all(torch.equal(one.stored[name], two.stored[name]) for name in one.stored)


LOG: list[tuple[str, tuple[int, ...]]] = []
SEEN: dict[tuple[str, int], Tensor] = {}


@dataclass(frozen=True, kw_only=True)
class Spy(Stage):
    """Notes which blocks it gets, and what enters the first of them."""

    label: str
    blocks: int = 1
    looks: bool = False  # keeps the uncompressed model's stream going

    @property
    def window(self) -> tuple[int, int]:
        return self.blocks, 1

    @property
    def original(self) -> bool:
        return self.looks

    def on_blocks(self, blocks: Sequence[Block]) -> None:
        first = blocks[0]
        LOG.append((self.label, tuple(block.index for block in blocks)))
        SEEN[self.label, first.index] = first.stream.hidden.clone()
        if first.origin is not None:
            SEEN[f"{self.label} original", first.index] = first.origin.stream.hidden.clone()


RTN = methods.get("rtn")
ORDERS = {
    1: [("a", (0,)), ("b", (0,)), ("c", (0,)), ("a", (1,)), ("b", (1,)), ("c", (1,))],
    2: [("a", (0,)), ("a", (1,)), ("b", (0, 1)), ("c", (0,)), ("a", (2,)), ("b", (1, 2))],
    3: [("a", (0,)), ("a", (1,)), ("a", (2,)), ("b", (0, 1, 2)), ("c", (0,)), ("a", (3,))],
}


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
def test_every_block_gets_its_stages_in_order(
    blocks: int, where: str, llama: Path, tmp_path: Path
) -> None:
    """And each of them sees the compressed blocks before; the original ones go beside."""
    LOG.clear()
    SEEN.clear()
    stages = [RTN(), Spy(label="a", looks=True), Spy(label="b", blocks=blocks), Spy(label="c")]
    done = run(llama, stages, tmp_path, where)
    assert done.finished == [0, 1, 2, 3]
    if blocks in ORDERS:
        assert LOG[:6] == ORDERS[blocks]
    assert [seen for label, seen in LOG if label == "c"] == [(0,), (1,), (2,), (3,)]
    stream = entering(llama, tmp_path)
    before = stream.twin()
    plain = run(llama, [RTN()], tmp_path)
    assert equal(plain, done)
    for index, (block, same) in enumerate(
        zip(loaded(Model.open(llama)), loaded(Model.open(llama)), strict=True)
    ):
        for label in {label for label, first in SEEN if first == index}:
            wanted = before if label.endswith("original") else stream
            torch.testing.assert_close(SEEN[label, index], wanted.hidden, rtol=1e-5, atol=1e-5)
        before.advance(index, same)
        for path, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear):
                part = f"model.layers.{index}.{path}.parts.0"
                linear.weight.data = dense(plain.stored, part, linear.weight.shape)
        stream.advance(index, block)
    assert {(f"{label} original", i) for label, i in SEEN if " " not in label} <= SEEN.keys()
    assert sorted(file.name for file in tmp_path.glob("*ahead*")) == []


def dense(stored: dict[str, Tensor], part: str, shape: Sequence[int]) -> Tensor:
    from aptq.core.parts import Quantized

    meta = {"type": "quantized", "grid": str(GRID)}
    keys = ("codes", "scale", "zero")
    tensors = {key: stored[f"{part}.{key}"] for key in keys}
    return Quantized.load(tensors, meta, (shape[0], shape[1])).dense()


@pytest.mark.parametrize("blocks", [2, 3])
def test_windows_without_steps_leave_gptq_as_it_is(
    blocks: int, llama: Path, tmp_path: Path
) -> None:
    """Every block's Hessians see what they see in a plain walk; the same bytes come out."""
    plain = run(llama, [GPTQ()], tmp_path)
    for stage in (AutoRound(steps=0, blocks=blocks), EfficientQAT(steps=0, blocks=blocks)):
        assert equal(run(llama, [GPTQ(), stage], tmp_path), plain)


@pytest.mark.parametrize("target", ["original", "same", "both"])
def test_disk_is_memory(target: str, llama: Path, tmp_path: Path) -> None:
    stages = [RTN(), EfficientQAT(steps=4, blocks=2, batch=2, target=target)]  # type: ignore[arg-type]
    one, two = run(llama, stages, tmp_path), run(llama, stages, tmp_path, "disk")
    assert equal(one, two)
    assert one.records == two.records
    assert not equal(one, run(llama, [RTN()], tmp_path))
    made = len([file for file in tmp_path.iterdir() if file.name.startswith("target")])
    assert made == (2 if target == "both" else 1)  # of one window at a time


def test_twice_is_the_same(llama: Path, tmp_path: Path) -> None:
    stages = [GPTQ(), AutoRound(steps=5, blocks=2, batch=2)]
    assert equal(run(llama, stages, tmp_path), run(llama, stages, tmp_path))


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("target", ["original", "both"])
def test_other_families(name: str, target: str, tmp_path: Path) -> None:
    """Experts, sliding attention, several norms: finished once, in order, none of them worse."""
    source = deep(name, tmp_path / "model", 3)
    stage = EfficientQAT(steps=6, blocks=2, batch=2, target=target)  # type: ignore[arg-type]
    done = run(source, [RTN(), stage], tmp_path)
    assert done.finished == [0, 1, 2]
    assert len(done.records) == 2
    assert all(found["end"] <= found["start"] for found in done.records)
    assert any(found["kept"] for found in done.records)


def test_streams_are_those_of_the_finished_blocks(llama: Path, tmp_path: Path) -> None:
    """Tuned norms and parts: what enters the last block is what the checkpoint's blocks give."""
    SEEN.clear()
    stage = EfficientQAT(steps=6, blocks=2, batch=2, norms=0.05)
    done = run(llama, [RTN(), stage, Spy(label="late")], tmp_path)
    stream = entering(llama, tmp_path)
    changed = 0
    for index, block in enumerate(loaded(Model.open(llama))):
        torch.testing.assert_close(SEEN["late", index], stream.hidden, rtol=1e-5, atol=1e-5)
        for name, value in block.named_parameters():
            full = f"model.layers.{index}.{name}"
            if full in done.stored:
                changed += int(not torch.equal(value, done.stored[full]))
                value.data = done.stored[full]
            else:
                part = full.replace(".weight", ".parts.0")
                value.data = dense(done.stored, part, value.shape)
        stream.advance(index, block)
    assert changed


def test_narrow_stages_between_wide_ones_are_refused(llama: Path, tmp_path: Path) -> None:
    wide = AutoRound(steps=1, blocks=2)
    with pytest.raises(ValueError, match="gptq stands between"):
        run(llama, [RTN(), wide, GPTQ(), wide], tmp_path)


# ---- one window by hand


def window(source: Path, folder: Path, stage: Reconstruct, blocks: int = 2) -> Window:
    """The first blocks with their knobs, as the stage would open them."""
    found: list[Window] = []

    @dataclass(frozen=True, kw_only=True)
    class Catch(type(stage)):  # type: ignore[misc]
        def fit(
            self, blocks: Sequence[Block], knobs: Sequence[Knobs], generator: torch.Generator
        ) -> None:
            options = {"target": self.target, "loss": self.loss, "size": 3}
            found.append(Window(blocks, knobs, weighted=self.rows == "gradient", **options))
            raise Caught

    caught = Catch(**vars(replace(stage, blocks=blocks)))
    with pytest.raises(Caught):
        run(source, [RTN(), caught], folder)
    return found[0]


class Caught(Exception):
    """Enough has been seen."""


def grads(made: Window, pieces: int) -> tuple[Tensor, list[Tensor]]:
    for knobs in made.knobs:
        knobs.zero_grad()
    loss = made.gradients(torch.tensor([0, 2, 5]), pieces)
    found = [
        x.grad.clone() for knobs in made.knobs for x in knobs.parameters() if x.grad is not None
    ]
    return loss, found


def test_pieces_add_up_to_the_batch(llama: Path, tmp_path: Path) -> None:
    made = window(llama, tmp_path, EfficientQAT(batch=3, pieces=2))
    whole, split = grads(made, 1), grads(made, 2)
    torch.testing.assert_close(whole[0], split[0])
    assert len(whole[1]) == 2 * (7 * 3 + 2)
    for one, two in zip(whole[1], split[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-7)


def test_targets_of_two_blocks(llama: Path, tmp_path: Path) -> None:
    """By hand: the original blocks on original inputs; "both" is the mean of two losses."""
    losses = {}
    for target in ("original", "same", "both"):
        made = window(llama, tmp_path, EfficientQAT(batch=3, target=target))  # type: ignore[arg-type]
        losses[target] = made.measure(torch.arange(6))
        assert losses[target] > 0
    # in front of the first block both inputs are the same
    assert losses["original"] == pytest.approx(losses["same"])
    assert losses["both"] == pytest.approx(losses["same"])
    stream = entering(llama, tmp_path)
    for index in (0, 1):
        stream.advance(index, loaded(Model.open(llama))[index])
    torch.testing.assert_close(made.wanted[0], stream.hidden, rtol=1e-5, atol=1e-5)
    plain = run(llama, [RTN()], tmp_path)
    values = [knobs.tensors() for knobs in made.knobs]
    got = made.output(torch.tensor([0, 2, 5]), values)
    assert plain.stream is not None
    assert float((got.detach() - stream.hidden[[0, 2, 5]]).square().mean()) == pytest.approx(
        float(made.distance(got, torch.tensor([0, 2, 5])).detach()), rel=1e-5
    )


def test_what_is_measured_is_what_is_stored(llama: Path, tmp_path: Path) -> None:
    """Hard weights; the soft ones are back afterwards."""
    made = window(llama, tmp_path, AutoRound(batch=3))
    with torch.no_grad():
        for knobs in made.knobs:
            for value in knobs.parameters():
                value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator()))
    before = made.measure(torch.arange(6))
    assert all(knobs.training for knobs in made.knobs)
    for knobs in made.knobs:
        knobs.settle()
    with torch.no_grad():
        x = made.stream.hidden
        for block in made.blocks:
            x = torch.cat([made.stream.calls[block.index][6].at(x).run(block.module)])
        after = float((x - made.wanted[0]).square().mean())
    assert after == pytest.approx(before, rel=1e-5)


def test_positions_are_weighted_by_the_profile_of_what_writes_the_output(
    llama: Path, tmp_path: Path
) -> None:
    profile = {"model.layers.1.mlp.down_proj": torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])}
    stages = [RTN(), EfficientQAT(steps=2, blocks=2, batch=2)]
    weighted = [RTN(), EfficientQAT(steps=2, blocks=2, batch=2, rows="gradient")]
    profiles = Profiles(12, profile)
    plain = run(llama, stages, tmp_path, profiles=profiles)
    other = run(llama, weighted, tmp_path, profiles=profiles)
    assert plain.records[0]["start"] != other.records[0]["start"]
    assert plain.records[1]["start"] == pytest.approx(other.records[1]["start"], rel=0.2)


# ---- shares of windows


@pytest.mark.parametrize("windows", [1, 2, 3, 5, 16, 96, 97])
@pytest.mark.parametrize("held", [0.0, 0.08, 0.5, 0.99])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_held_out_windows_are_whole_batches(windows: int, held: float, size: int) -> None:
    batch = batch_of(size, windows)
    count = held_out(windows, batch, held)
    inside, outside = shares(windows, batch, held)
    assert count % batch == 0
    assert len(inside) == windows - count >= batch
    if windows > 1:
        assert len(outside) == count > 0
        assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(windows))
    if (windows, held, size) == (96, 0.08, 8):
        assert count == 8
