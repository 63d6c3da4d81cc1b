"""Normalisation keeps the function and turns every weight into an nn.Linear."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from aptq.model.archs import ARCHS
from aptq.model.normalise import Experts, Joined, normalise, normalise_model
from tests.tiny import TABLE, TINY, tiny_network, tiny_tokens


def test_conv1d_becomes_linear() -> None:
    torch.manual_seed(0)
    root = nn.Sequential(Conv1D(6, 10))
    x = torch.randn(3, 10)
    before = root(x)
    normalise(root, {}, TINY["gpt2"]())
    assert type(root[0]) is nn.Linear
    assert root[0].weight.shape == (6, 10)
    assert root[0].weight.is_contiguous()
    torch.testing.assert_close(root(x), before)


def test_split_rows_are_views() -> None:
    config = TINY["phi3"]()  # 4 heads, 2 of them for keys and values
    fused = nn.Linear(48, 8 * 12, bias=True)
    root = nn.Sequential(fused)
    x = torch.randn(5, 48)
    before = fused(x)
    normalise(root, {"0": ("q", "k", "v")}, config)
    joined = root[0]
    assert isinstance(joined, Joined)
    assert [part.out_features for part in joined.children()] == [48, 24, 24]
    assert joined.get_submodule("k").weight.data_ptr() == fused.weight[48:].data_ptr()
    torch.testing.assert_close(root(x), before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_equal_the_fused_module(name: str) -> None:
    model = tiny_network(name)
    block = model.get_submodule(ARCHS[model.config.model_type].blocks)[0]
    fused = block.mlp.experts
    x = torch.randn(20, 48)
    chosen = torch.rand(20, 4).topk(2).indices
    weights = torch.rand(20, 2)
    model.set_experts_implementation("eager")
    before = fused(x, chosen, weights)
    normalise(block, {}, model.config)
    experts = block.mlp.experts
    assert isinstance(experts, Experts)
    assert experts.num_experts == 4
    torch.testing.assert_close(experts(x, chosen, weights), before, atol=1e-6, rtol=1e-6)


def test_experts_tell_which_tokens_they_get() -> None:
    model = tiny_network("mixtral")
    block = normalise(model.model.layers[0], {}, model.config)
    experts = block.get_submodule("mlp.experts")
    x = torch.randn(20, 48)
    chosen = torch.rand(20, 4).topk(2).indices
    seen = {}

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[module] = experts.routed
        assert torch.equal(args[0], x[experts.routed])

    for index in range(4):
        experts.get_submodule(f"{index}.gate_proj").register_forward_pre_hook(hook)
    experts(x, chosen, torch.ones(20, 2))
    assert sum(len(tokens) for tokens in seen.values()) == 40
    assert experts.routed is None


def test_an_expert_without_tokens_is_not_called() -> None:
    model = tiny_network("mixtral")
    experts = normalise(model.model.layers[0], {}, model.config).get_submodule("mlp.experts")
    experts.get_submodule("3").register_forward_pre_hook(lambda *_: pytest.fail("called"))
    experts(torch.randn(5, 48), torch.tensor([[0, 1]] * 5), torch.ones(5, 2))


def test_biased_experts_are_refused() -> None:
    model = tiny_network("gpt_oss")
    with pytest.raises(ValueError, match="'gpt_oss' fuses its experts") as caught:
        normalise(model.model.layers[0], {}, model.config, "model.layers.0")
    assert "model.layers.0.mlp.experts (GptOssExperts) holds gate_up_proj" in str(caught.value)


def test_experts_with_their_own_gate_are_refused() -> None:
    model = tiny_network("mixtral")
    block = model.model.layers[0]

    class Clamped(type(block.mlp.experts)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate_up.clamp(max=7)

    block.mlp.experts.__class__ = Clamped
    with pytest.raises(ValueError, match="Clamped"):
        normalise(block, {}, model.config)


@pytest.mark.parametrize("name", TABLE)
def test_whole_model_on_meta_and_with_weights(name: str) -> None:
    """normalise_model() is what the runtime uses: same names on meta, same function."""
    model = tiny_network(name)
    empty = copy.deepcopy(model).to("meta")
    model.set_experts_implementation("eager")
    ids = tiny_tokens()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        normalise_model(model, model.config)
        after = model(ids, use_cache=False).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    normalise_model(empty, empty.config)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.parameters())
