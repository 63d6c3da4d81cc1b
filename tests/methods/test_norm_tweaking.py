"""Norm tweaking: nothing but norms changes, and only where statistics come nearer."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.engine.block import Block
from aptq.engine.stage import Stage, methods
from aptq.engine.stream import open_stream
from aptq.engine.walk import walk
from aptq.methods.reconstruct.norm_tweaking import NormTweaking
from aptq.model.model import Model
from tests.engine.run import CPU, windows
from tests.tiny import tiny_model

RTN = methods.get("rtn")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), torch.float32)


def walked(
    source: Path, folder: Path, stages: Sequence[Stage], grid: str = "int2-g16-z"
) -> tuple[dict[str, Tensor], list[Block]]:
    """Stored tensors by name, and the blocks."""
    model, stored, done = Model.open(source), dict[str, Tensor](), list[Block]()
    stream = open_stream(model, windows(16, 24), device=CPU, folder=folder, where="memory")

    def sink(block: Block) -> None:
        stored.update({name: value.clone() for name, value in block.stored().items()})
        done.append(block)

    walk(model, stream, stages, Plan.uniform(model.shapes, Grid.parse(grid)), sink=sink)
    return stored, done


def changed(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


@pytest.mark.parametrize("first", [(), ("rtn",), ("gptq",)])
def test_only_norms_differ(first: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    """In the first block; the later ones see other inputs where the method before looks at them."""
    stages = [methods.get(name)() for name in first]
    before, _ = walked(llama, tmp_path, stages or [RTN()])
    after, blocks = walked(llama, tmp_path, [*stages, NormTweaking(norms=0.01)])
    names = {name for name in changed(before, after) if "layers.0." in name or "gptq" not in first}
    assert names
    assert all(name.endswith("layernorm.weight") for name in names), names
    for block in blocks:
        (found,) = block.records
        assert found["kept"]
        assert found["end"] < found["start"]


def test_rate_of_zero_is_the_method_before(llama: Path, tmp_path: Path) -> None:
    before, _ = walked(llama, tmp_path, [RTN()])
    after, blocks = walked(llama, tmp_path, [RTN(), NormTweaking(norms=0.0)])
    assert not changed(before, after)
    assert [block.records for block in blocks] == [[{"stage": "norm_tweaking", "norms": 0}]] * 2


def test_no_damage_leaves_norms_bit_identical(llama: Path, tmp_path: Path) -> None:
    before, _ = walked(llama, tmp_path, [RTN()], "bf16")
    after, blocks = walked(llama, tmp_path, [RTN(), NormTweaking(norms=0.1)], "bf16")
    assert not changed(before, after) or blocks[0].records[0]["start"] > 0
    model = Model.open(llama)
    norm = model.load(0).get_parameter("input_layernorm.weight")
    exact = {f"model.layers.0.{name}" for name in ("input_layernorm.weight",)}
    kept, _ = walked(llama, tmp_path, [Keep(), NormTweaking(norms=0.1)], "bf16")
    assert all(torch.equal(kept[name], norm) for name in exact)


class Keep(Stage):
    """Puts the weights themselves back, so that nothing at all is damaged."""

    def on_blocks(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            assert block.origin is not None
            for path, linear in block.linears.items():
                same = block.origin.module.get_submodule(path.removeprefix(f"{block.name}."))
                assert isinstance(same, nn.Linear)
                linear.weight.data = same.weight.data


def test_planted_error_behind_a_norm_is_reduced(llama: Path, tmp_path: Path) -> None:
    """Inputs of an MLP 1.5 times too large: means and variances of held-out outputs come back."""

    class Plant(Stage):
        def on_blocks(self, blocks: Sequence[Block]) -> None:
            for block in blocks:
                norm = block.module.get_parameter("post_attention_layernorm.weight")
                norm.data = 1.5 * norm.data

    stages = [methods.get("rtn")(), Plant(), NormTweaking(norms=0.02, steps=60, batch=4)]
    _, blocks = walked(llama, tmp_path, stages, "int8-g16-z")
    for block in blocks:
        (found,) = block.records
        assert found["end"] < 0.3 * found["start"]


def test_one_pass_over_the_windows_by_default(llama: Path, tmp_path: Path) -> None:
    seen = list[int]()

    class Counting(NormTweaking):
        name = "counting"

        def pace(self):  # type: ignore[no-untyped-def]
            seen.append(self.steps)
            return super().pace()

    for batch, steps in ((1, 14), (3, 4), (8, 1)):
        seen.clear()
        walked(llama, tmp_path, [RTN(), Counting(batch=batch)])
        assert seen == [steps] * 2
    walked(llama, tmp_path, [RTN(), Counting(steps=5)])
    assert seen[-1] == 5


def test_later_blocks_move_faster() -> None:
    stage = NormTweaking(norms=1e-5, scale=5.0)
    assert stage.rate(0, 4) == 1e-5
    assert stage.rate(3, 4) == pytest.approx(1e-5 * (1 + 5 * 3 / 4))
    with pytest.raises(ValueError, match="scale"):
        NormTweaking(scale=-1.0)


def test_blocks_without_norms_stay_and_are_counted(llama: Path, tmp_path: Path) -> None:
    class Smooth(Stage):
        """Takes the norms' weights away, as families without them have it."""

        def on_blocks(self, blocks: Sequence[Block]) -> None:
            for block in blocks:
                for name in ("input_layernorm", "post_attention_layernorm"):
                    setattr(block.module, name, nn.Identity())

    before, _ = walked(llama, tmp_path, [Smooth(), RTN()])
    after, blocks = walked(llama, tmp_path, [Smooth(), RTN(), NormTweaking()])
    assert not changed(before, after)
    assert all(block.records == [{"stage": "norm_tweaking", "norms": 0}] for block in blocks)


@pytest.mark.parametrize("name", ["opt", "gemma3", "qwen3", "gpt2"])
def test_norms_of_other_families(name: str, tmp_path: Path) -> None:
    """Biases of layer norms, norms of queries and keys, four norms a block."""
    source = tiny_model(name, tmp_path / "model", torch.float32)
    before, _ = walked(source, tmp_path, [RTN()])
    after, blocks = walked(source, tmp_path, [RTN(), NormTweaking(norms=0.01)])
    names = changed(before, after)
    assert names
    assert all("norm" in name or ".ln_" in name for name in names)
    assert any(block.records[0]["kept"] for block in blocks)
    kinds = {name.split(".", 3)[-1] for name in names}
    expected = {
        "opt": {"self_attn_layer_norm.bias", "final_layer_norm.bias"},
        "gemma3": {"self_attn.q_norm.weight", "post_feedforward_layernorm.weight"},
        "qwen3": {"self_attn.k_norm.weight"},
        "gpt2": {"ln_1.bias", "ln_2.weight"},
    }[name]
    assert {e for e in expected if any(kind.endswith(e) for kind in kinds)} == expected
