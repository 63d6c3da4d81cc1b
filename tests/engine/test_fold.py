"""Folds change nothing: every pair of every tiny architecture, at scales from 0.3 to 3."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig

from aptq.engine.fold import (
    BENT,
    FUSED,
    NORMED,
    ROUTED,
    TRACED,
    Pair,
    foldable,
    rotary_pairs,
)
from tests.blocks import Opened, opened
from tests.tiny import TABLE, TINY
from tests.tiny import TRACED as UNKNOWN

BLOCKS = list(
    itertools.product([name for name in TINY if name not in ("gpt_oss", "gemma3n")], (0, 1))
)
EXACT = ("gpt2", "opt", "gpt_neox")  # their norms compute in float64 too


def block(
    name: str, index: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Opened, list[Pair]]:
    """An opened block with norms and biases that are not what they start as, and its pairs."""
    made = opened(name, index, dtype=dtype)
    return made, foldable(made.module, made.name, made.groups)[0]


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def output(made: Opened, found: dict[str, Tensor]) -> Tensor:
    return made.call.run(lambda *a, **k: functional_call(made.module, found, a, k))


def change(made: Opened, found: dict[str, Tensor]) -> float:
    """Largest change of what the block adds, relative to the largest that it adds."""
    with torch.no_grad():
        wanted, got = output(made, values(made.module)), output(made, found)
    return float((got - wanted).abs().max() / (wanted - made.call.hidden).abs().max())


def scales(width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[width] between 0.3 and 3."""
    return 0.3 * 10 ** torch.rand(width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def folded(made: Opened, pairs: list[Pair], *, shifts: bool = False) -> dict[str, Tensor]:
    """All pairs one after the other."""
    found = values(made.module)
    for number, pair in enumerate(pairs):
        dtype = made.call.hidden.dtype
        shift = scales(pair.width, dtype, 100 + number) - 1 if shifts and pair.shifts else None
        found |= pair.fold(found, scales(pair.width, dtype, number), shift)
    return found


def limit(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-10


@pytest.mark.parametrize(("name", "index"), BLOCKS)
def test_scales_change_nothing(name: str, index: int) -> None:
    """Each pair alone, then all of them; and every fold does change the weights."""
    made, pairs = block(name, index)
    for pair in pairs:
        found = folded(made, [pair])
        assert change(made, found) < 1e-5, pair
        before = values(made.module)
        changed = {key for key in found if not torch.equal(found[key], before[key])}
        assert changed == set(pair.names(made.module)) - {
            f"{path}.bias" for path in pair.readers if pair.kind != "q-k"
        }
    assert change(made, folded(made, pairs)) < 2e-5


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shifts", [False, True])
def test_in_float64_to_its_rounding(name: str, shifts: bool) -> None:
    made, pairs = block(name, dtype=torch.float64)
    assert any(pair.shifts for pair in pairs)
    assert change(made, folded(made, pairs, shifts=shifts)) < 1e-10


@pytest.mark.parametrize("name", TABLE)
def test_matrices_between_v_and_o(name: str) -> None:
    """Any invertible one for each KV head, here strictly dominant; not one for query heads."""
    made, pairs = block(name, dtype=torch.float64 if name in EXACT else torch.float32)
    for pair in (x for x in pairs if x.kind == "v-o"):
        dtype, size = made.call.hidden.dtype, pair.width // pair.heads
        noise = torch.randn(pair.heads, size, size, generator=torch.Generator().manual_seed(0))
        matrix = scales(pair.width, dtype).view(pair.heads, -1).diag_embed()
        matrix = matrix + 0.3 / size * noise.to(dtype)
        before = values(made.module)
        assert change(made, before | pair.fold(before, matrix)) < limit(dtype)
        exact = pair.fold(before, matrix.diagonal(dim1=1, dim2=2).diag_embed())
        for key, value in pair.fold(before, matrix.diagonal(dim1=1, dim2=2).flatten()).items():
            torch.testing.assert_close(exact[key], value)
        assert (
            change(made, before | {f"{pair.source}.weight": exact[f"{pair.source}.weight"]}) > 0.01
        )


@pytest.mark.parametrize("name", ["llama", "cohere2", "phi3"])
def test_untied_rotary_pairs_change_the_block(name: str) -> None:
    """Also where the pairs are tied as another family rotates them."""
    made, pairs = block(name)
    pair = next(x for x in pairs if x.kind == "q-k")
    assert pair.turned is not None
    size = len(pair.turned)
    free = replace(pair, width=pair.heads * size, turned=torch.arange(size))
    assert change(made, folded(made, [free])) > 1e-3
    halves, neighbours = torch.arange(size) % (size // 2), torch.arange(size) // 2
    wrong = neighbours if torch.equal(pair.turned, halves) else halves
    assert change(made, folded(made, [replace(pair, turned=wrong)])) > 1e-3


def test_rotary_pairs_of_a_partly_rotated_head() -> None:
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    config = AutoConfig.for_model("phi3", pad_token_id=0, rope_parameters=rope)
    assert rotary_pairs(config, 8).tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


def test_pairs_and_reasons() -> None:
    """The whole matrix: a family that gains or loses a pair has to say so here."""
    every = {"norm": 2, "v-o": 1, "up-down": 1, "q-k": 1}
    expected = {name: every for name in ("llama", "mistral", "qwen2", "gemma2", "phi3")}
    expected |= {name: {**every, "q-k": 0} for name in ("qwen3", "gemma3")}
    expected |= {name: {**every, "up-down": 0} for name in ("gpt2", "opt")}
    expected |= {"gpt_neox": {"norm": 2, "v-o": 0, "up-down": 0, "q-k": 0}}
    expected |= {"cohere2": {**every, "norm": 1}}  # one norm feeds attention and MLP
    expected |= {"mixtral": {**every, "norm": 1, "up-down": 4}}
    expected |= {"qwen3_moe": {**every, "norm": 1, "up-down": 4, "q-k": 0}}
    reasons = {
        **{name: {"q -> k": NORMED} for name in ("qwen3", "gemma3")},
        **{name: {"-> down": BENT} for name in ("gpt2", "opt")},
        "gpt_neox": {"q -> k": FUSED, "-> o": FUSED, "-> down": BENT},
        "mixtral": {"-> gate/up": ROUTED},
        "qwen3_moe": {"q -> k": NORMED, "-> gate/up": ROUTED},
    }
    for name in TABLE:
        made = opened(name, dtype=torch.float32)
        pairs, refused = foldable(made.module, made.name, made.groups)
        kinds = [pair.kind for pair in pairs]
        assert {kind: kinds.count(kind) for kind in every} == expected[name], name
        assert refused == reasons.get(name, {}), name
    for name in UNKNOWN:
        made = opened(name, dtype=torch.float32)
        pairs, refused = foldable(made.module, made.name, made.groups)
        assert not pairs
        assert set(refused.values()) == {TRACED}


def test_shifts_need_biases() -> None:
    """LayerNorm families have them; Llama nowhere; Qwen2 in q, k, v, but not in its norm."""
    for name in TABLE:
        _, pairs = block(name)
        wanted = {"norm", "v-o"} if name in ("gpt2", "opt") else set()
        wanted = {"norm"} if name == "gpt_neox" else wanted
        assert {pair.kind for pair in pairs if pair.shifts} == wanted, name
    _, pairs = block("llama")
    with pytest.raises(AssertionError, match="takes no shift"):
        pairs[0].fold({}, torch.ones(48), torch.ones(48))
