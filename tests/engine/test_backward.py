"""The backward walk equals automatic differentiation of the whole model, whatever its storage."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from aptq.core.profile import bin_of, row_weights
from aptq.engine import tail
from aptq.engine.backward import Labels, Observed, backward_walk
from aptq.engine.stat import Seen, Stat
from aptq.engine.stream import Where, batch_windows
from aptq.engine.tail import sample
from aptq.engine.tape import Tape, open_tape, tape_bytes
from aptq.engine.walk import Progress
from aptq.model.model import Model
from aptq.model.normalise import normalise_model
from aptq.stats.gradient import Gradient
from aptq.stats.hessian import Hessian
from tests.engine.run import CPU, windows
from tests.tiny import TINY, tiny_model

LENGTH, COUNT, SEED = 64, 20, 3  # 16 windows are one batch, four are left
NAMES = ["llama", "gemma2", "gemma3", "gpt2", "opt", "phi3", "granite", "mixtral", "qwen3_moe"]


@dataclass(frozen=True, kw_only=True)
class Kept(Stat):
    """Everything that was seen, batch after batch."""

    seen: list[Seen] = field(default_factory=list, compare=False)

    own = True  # type: ignore[assignment]
    gradient = True  # type: ignore[assignment]

    def start(self, columns: int, device: torch.device) -> Self:
        return type(self)()

    def update(self, seen: Seen) -> None:
        assert seen.grad is not None
        assert not seen.x.requires_grad
        self.seen.append(seen._replace(x=seen.x.clone(), grad=seen.grad.clone()))

    def merge(self, other: Self) -> None:
        self.seen.extend(other.seen)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def forget(self) -> None: ...

    def nbytes(self, columns: int) -> int:
        return 0


Found = dict[str, Tensor]


def kept(block: Observed) -> Found:
    """Output gradients of every layer that had rows, [rows, out]."""
    found = {}
    for name, layer in block.layers.items():
        stat = layer.stats[Kept()]
        assert isinstance(stat, Kept)
        if stat.seen:
            found[name] = torch.cat([seen.grad for seen in stat.seen if seen.grad is not None])
    return found


def collected(
    model: Model,
    folder: Path,
    labels: Labels = "sampled",
    where: Where = "memory",
    ids: Tensor | None = None,
    seed: int = SEED,
) -> Found:
    ids = windows(COUNT, LENGTH) if ids is None else ids
    found: Found = {}

    def visit(block: Observed) -> None:
        block.observe((Kept(),))
        found.update(kept(block))

    tape = open_tape(model, ids, device=CPU, folder=folder, where=where)
    backward_walk(model, tape, ids, visit, labels=labels, seed=seed)
    return found


def reference(folder: Path, ids: Tensor, labels: Labels) -> Found:
    """The same gradients by one backward pass of the whole model, batch by batch."""
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    normalise_model(whole, whole.config)
    parts: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: object, _args: object, output: Tensor) -> None:
            output.register_hook(
                lambda grad: parts.setdefault(name, []).append(
                    grad.detach().reshape(-1, grad.shape[-1]).clone()
                )
            )

        return hook

    for name, module in whole.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_hook(keep(name))
    chance = torch.rand(
        ids.shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64
    )
    batch = batch_windows(LENGTH, CPU) // 4
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        logits = whole(part, use_cache=False).logits.float()
        if labels == "sampled":
            target = sample(logits.detach(), chance[start : start + batch])
        else:
            target = F.pad(part[:, 1:], (0, 1), value=-100)
        F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=-100
        ).backward()
    return {name: torch.cat(grads) for name, grads in parts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), torch.float32)


@pytest.mark.parametrize("labels", ["sampled", "data"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_autograd(name: str, labels: Labels, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path / "model", torch.float32)
    model, ids = Model.open(source), windows(COUNT, LENGTH)
    found, wanted = collected(model, tmp_path, labels), reference(source, ids, labels)
    assert len(found) >= 12
    assert found.keys() <= wanted.keys()
    for layer, grad in found.items():
        error = (grad - wanted[layer]).norm() / wanted[layer].norm()
        assert error < 1e-5, (layer, error)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_deep_model(where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots move up by one with every block; five blocks show that none is mixed up."""
    config = TINY["llama"]()
    config.num_hidden_layers = 5
    monkeypatch.setitem(TINY, "deep", lambda: config)
    source = tiny_model("deep", tmp_path / "model", torch.float32)
    (work := tmp_path / "work").mkdir()
    model, ids = Model.open(source), windows(COUNT, LENGTH)
    found = collected(model, work, where=where)
    wanted = reference(source, ids, "sampled")
    assert set(found) == set(model.shapes)
    assert not list(work.iterdir())
    for layer, grad in found.items():
        assert (grad - wanted[layer]).norm() < 1e-5 * wanted[layer].norm(), layer


def test_statistics_equal_their_definition(folder: Path, tmp_path: Path) -> None:
    model, ids = Model.open(folder), windows(COUNT, LENGTH)
    wanted = reference(folder, ids, "sampled")
    stats: dict[str, Gradient] = {}

    def visit(block: Observed) -> None:
        block.observe((Gradient(),))
        for name, layer in block.layers.items():
            stat = layer.stats[Gradient()]
            assert isinstance(stat, Gradient)
            stats[name] = stat

    tape = open_tape(model, ids, device=CPU, folder=tmp_path)
    backward_walk(model, tape, ids, visit, seed=SEED)
    assert set(stats) == set(model.shapes)
    for name, stat in stats.items():
        square = wanted[name].double().square().view(COUNT, LENGTH, -1)
        bins = bin_of(LENGTH)
        profile = [square.sum(2)[:, bins == b].mean() for b in range(int(bins.max()) + 1)]
        rows, odd = stat.rows(), stat.rows(half=1)
        found = stat.profile()
        assert found is not None
        assert rows is not None
        assert odd is not None
        torch.testing.assert_close(found, torch.stack(profile), rtol=2e-5, atol=0)
        torch.testing.assert_close(rows, square.mean((0, 1)), rtol=2e-5, atol=0)
        torch.testing.assert_close(odd, square[1::2].mean((0, 1)), rtol=2e-5, atol=0)


def test_second_pass_sees_the_same_and_knows_profiles(folder: Path, tmp_path: Path) -> None:
    model, ids = Model.open(folder), windows(COUNT, LENGTH)
    weighted = Hessian(rows="gradient")

    def visit(block: Observed) -> None:
        block.observe((Kept(), Hessian()))
        first = kept(block)
        for layer in block.layers.values():
            layer.profile, layer.window = torch.arange(1.0, 8.0), LENGTH
        name = f"{block.name}.mlp.down_proj"
        block.observe({name: [Kept(), weighted], f"{block.name}.self_attn.q_proj": [Kept()]})
        assert weighted not in block.layers[f"{block.name}.self_attn.q_proj"].stats
        second = kept(block)
        assert all(torch.equal(first[path], second[path]) for path in first)
        stat, kept_stat = (block.layers[name].stats[need] for need in (weighted, Kept()))
        assert isinstance(stat, Hessian)
        assert isinstance(kept_stat, Kept)
        x = torch.cat([seen.x for seen in kept_stat.seen]).double()
        weight = row_weights(torch.arange(1.0, 8.0), LENGTH, LENGTH).double().repeat(COUNT)
        expected = (x * weight[:, None]).T @ x / weight.sum()
        torch.testing.assert_close(stat.matrix().double(), expected, rtol=1e-4, atol=1e-5)

    tape = open_tape(model, ids, device=CPU, folder=tmp_path)
    backward_walk(model, tape, ids, visit)


def test_halves_and_positions(folder: Path, tmp_path: Path) -> None:
    model, ids = Model.open(folder), windows(COUNT, LENGTH)
    name = "model.layers.1.self_attn.o_proj"
    found: list[Seen] = []

    def visit(block: Observed) -> None:
        if name in block.layers:
            block.observe((Kept(),), [block.layers[name]])
            stat = block.layers[name].stats[Kept()]
            assert isinstance(stat, Kept)
            found.extend(stat.seen)

    tape = open_tape(model, ids, device=CPU, folder=tmp_path)
    backward_walk(model, tape, ids, visit)
    token = torch.arange(COUNT * LENGTH)
    position = torch.cat([seen.position for seen in found if seen.position is not None])
    half = torch.cat([seen.half for seen in found if seen.half is not None])
    assert torch.equal(position, token % LENGTH)
    assert torch.equal(half, token // LENGTH % 2)


def test_blocks_may_be_left_unobserved(folder: Path, tmp_path: Path) -> None:
    """The walk itself hands the gradient on where `visit` does not look."""
    model, ids = Model.open(folder), windows(COUNT, LENGTH)
    found: Found = {}

    def visit(block: Observed) -> None:
        if block.index == 0:
            block.observe((Kept(),))
            found.update(kept(block))

    tape = open_tape(model, ids, device=CPU, folder=tmp_path)
    backward_walk(model, tape, ids, visit, seed=SEED)
    whole = collected(model, tmp_path)
    assert found
    assert all(torch.equal(grad, whole[name]) for name, grad in found.items())


def test_seeds_decide(folder: Path, tmp_path: Path) -> None:
    model = Model.open(folder)
    one, two, other = (collected(model, tmp_path, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_disk_is_memory_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    model, ids = Model.open(folder), windows(COUNT, LENGTH)
    one = collected(model, tmp_path, where="memory")
    assert not list(tmp_path.iterdir())
    two = collected(model, tmp_path, where="disk")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list(tmp_path.iterdir())
    tape = open_tape(model, ids, device=CPU, folder=tmp_path, where="disk")
    assert list(tmp_path.iterdir())
    tape.close()
    assert not list(tmp_path.iterdir())


def test_disk_use_is_as_planned(folder: Path, tmp_path: Path) -> None:
    """Inputs of all blocks and two gradients at the last block; one slot less a block after it."""
    model, ids = Model.open(folder), windows(COUNT, LENGTH)
    slot = ids.numel() * 48 * 4

    def used() -> int:
        return sum(file.stat().st_size for file in tmp_path.iterdir())

    steps: list[Progress] = []
    tape = open_tape(model, ids, device=CPU, folder=tmp_path, where="disk", report=steps.append)
    assert used() == tape.nbytes == 3 * slot
    peaks: list[int] = []

    def visit(block: Observed) -> None:
        block.observe((Gradient(),))
        peaks.append(used())

    backward_walk(model, tape, ids, visit, report=steps.append)
    assert peaks == [4 * slot, 2 * slot]
    assert tape_bytes(model, ids.numel()) == max(peaks)
    assert [step.block for step in steps] == [0, 1, 1, 0]


def test_a_failed_walk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    model, ids = Model.open(folder), windows(COUNT, LENGTH)

    def visit(block: Observed) -> None:
        raise RuntimeError("stop")

    tape: Tape = open_tape(model, ids, device=CPU, folder=tmp_path, where="disk")
    with pytest.raises(RuntimeError, match="stop"):
        backward_walk(model, tape, ids, visit)
    assert not list(tmp_path.iterdir())
    collected(model, tmp_path)  # and the model can be walked again


def test_experts_without_rows_have_no_profile(tmp_path: Path) -> None:
    """With three tokens some experts stay empty: no profile, and weighting them is counted."""
    model = Model.open(tiny_model("mixtral", tmp_path / "model", torch.float32))
    ids, weighted = windows(1, 1), Hessian(rows="gradient")
    bare: list[str] = []

    def visit(block: Observed) -> None:
        block.observe((Gradient(),))
        for name, layer in block.layers.items():
            stat = layer.stats[Gradient()]
            assert isinstance(stat, Gradient)
            layer.profile, layer.window = stat.profile(), 1
            assert (layer.profile is None) == (stat.rows() is None)
            bare.extend([name] if layer.profile is None else [])
        block.observe((weighted,))
        for layer in block.layers.values():
            assert ("unweighted" in layer.counts) == (layer.profile is None)

    tape = open_tape(model, ids, device=CPU, folder=tmp_path)
    backward_walk(model, tape, ids, visit)
    assert len(bare) == 2 * 2 * 3  # two of four experts a block


@pytest.mark.parametrize("tokens", [10, 150])
def test_logits_in_pieces(
    tokens: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cutting windows or batches of windows changes neither labels nor gradients."""
    whole = collected(Model.open(folder), tmp_path)
    monkeypatch.setattr(tail, "PIECE", tail.PER_LOGIT * 260 * tokens)
    seen = torch.zeros(COUNT, LENGTH, dtype=torch.int64)
    for piece in tail.pieces((COUNT, LENGTH), 260):
        assert seen[piece].numel() <= tokens
        seen[piece] += 1
    assert bool((seen == 1).all())
    for name, grad in collected(Model.open(folder), tmp_path).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_gpu_is_the_cpu(name: str, where: Where, tmp_path: Path) -> None:
    source = tiny_model(name, tmp_path / "model", torch.float32)
    model, ids = Model.open(source), windows(COUNT, LENGTH)
    profiles: list[dict[str, Tensor]] = []

    def visit(block: Observed) -> None:
        block.observe((Gradient(),))
        for layer in block.layers.values():
            stat = layer.stats[Gradient()]
            assert isinstance(stat, Gradient)
            found = stat.profile()
            assert found is not None
            profiles[-1][layer.name] = found.cpu()

    for device in ("cpu", "cuda"):
        profiles.append({})
        tape = open_tape(model, ids, device=torch.device(device), folder=tmp_path, where=where)
        backward_walk(model, tape, ids, visit, labels="data")
    for layer, profile in profiles[0].items():
        torch.testing.assert_close(profiles[1][layer], profile, rtol=1e-3, atol=1e-6)


def test_samples_follow_the_model() -> None:
    logits = torch.tensor([0.0, 1.0, -50.0, 2.0]).expand(1, 200_000, 4)
    chance = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = sample(logits, chance).flatten().bincount(minlength=4) / 200_000
    torch.testing.assert_close(share, logits[0, 0].softmax(0), rtol=0, atol=4e-3)
    edges = torch.tensor([[0.0, 1.0 - 2**-53]], dtype=torch.float64)
    never = torch.tensor([-1e4, 0.0, 1.0, -1e4]).expand(1, 2, 4)  # labels of probability zero
    assert sample(never, edges).tolist() == [[1, 2]]
