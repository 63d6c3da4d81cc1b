"""Families outside the table: traced, or refused by name before a weight is read."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from aptq.model.archs import ARCHS, Arch
from aptq.model.dry import foreign
from aptq.model.layout import expand
from aptq.model.normalise import Experts, normalise
from aptq.model.skeleton import build_skeleton
from aptq.model.trace import trace
from tests.tiny import TINY, TRACED


def _traced(name: str) -> Arch:
    config = TINY[name]()
    return trace(build_skeleton(config, torch.float32), config)


@pytest.mark.parametrize("name", TRACED)
def test_every_linear_is_in_exactly_one_group(name: str) -> None:
    config = TINY[name]()
    skeleton = build_skeleton(config, torch.float32)
    arch = trace(skeleton, config)
    for block in skeleton.get_submodule(arch.blocks).children():
        normalise(block, arch.joined, config)
        paths = [path for group in expand(arch.groups, block) for path in group.linears.values()]
        present = {path for path, module in block.named_modules() if type(module) is nn.Linear}
        assert len(paths) == len(set(paths))
        assert set(paths) == present - set(arch.ignore)


def test_llama_like_families_look_like_llama() -> None:
    for name in ("olmo2", "granite"):
        found = [(group.kind, group.linears) for group in _traced(name).groups]
        assert found == [(group.kind, group.linears) for group in ARCHS["llama"].groups]


def test_deepseek_low_rank_attention() -> None:
    groups: dict[str, list[set[str]]] = {}
    for group in _traced("deepseek_v3").groups:
        groups.setdefault(group.kind, []).append(set(group.linears.values()))
    assert groups["attn_in"] == [{"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}]
    assert groups["other"] == [{"self_attn.q_b_proj"}, {"self_attn.kv_b_proj"}]
    assert {"mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"} in groups["mlp_in"]
    assert {"mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"} in groups["mlp_in"]


def test_qwen3_next_keeps_routers_and_finds_the_norm_shift() -> None:
    arch = _traced("qwen3_next")
    assert set(arch.ignore) == {"mlp.gate", "mlp.shared_expert_gate"}
    assert arch.norm_shift == 1.0
    assert arch.attention == "self_attn"
    first = [group.kind for group in arch.groups].index("mlp_in")
    assert all(group.kind.startswith("attn") for group in arch.groups[:first])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma3n", "shared_kv_states"), ("gpt_oss", "GptOssExperts")],
)
def test_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        _traced(name)
    what, _, instead = str(caught.value).split("\n")
    assert TINY[name]().model_type in what
    assert instead.startswith("choose another model")


def test_blocks_that_return_tuples_are_refused() -> None:
    config = AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=100)
    with pytest.raises(ValueError, match=r"'bloom' .*\n.*hidden states of shape \[12, 32\]"):
        trace(build_skeleton(config, torch.float32), config)


def test_what_foreign_code_raises_is_a_refusal() -> None:
    with pytest.raises(ValueError, match=r"^model type 'llama' .*\ndecoder: a b\nchoose"):  # noqa: SIM117
        with foreign(TINY["llama"](), "decoder"):
            raise IndexError("a b\nc")


def test_a_changed_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were experts unfused wrongly, the output of a random block would tell."""
    forward = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda *args: 2 * forward(*args))
    with pytest.raises(ValueError, match="fused weights of an unknown form"):
        _traced("qwen3_next")
