"""Units of a block: who sees which linear, when, and that looking leaves no trace."""

import torch
from torch import nn

from aptq.model.watch import AttentionTrace, watched
from tests.blocks import opened


def test_traces_exist_while_their_unit_runs() -> None:
    block = opened("llama")
    seen: dict[str, bool] = {}
    with watched(block.module, block.name, block.groups) as lookup:
        assert lookup(block.paths["q"]) is None

        def show(role: str, _: torch.Tensor) -> None:
            seen[role] = lookup(block.paths[role]) is not None
            other = "q" if role in ("gate", "up", "down") else "up"
            seen[f"{role} elsewhere"] = lookup(block.paths[other]) is None

        with block.hooked(show), torch.inference_mode():
            block.call.run(block.module)
        assert lookup(block.paths["q"]) is None
        assert lookup("model.norm") is None
    assert all(seen.values())
    assert set(block.paths) < set(seen)
    hooks = [m for m in block.module.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks


def test_looking_changes_nothing_and_calls_no_hooks() -> None:
    block = opened("qwen3", dtype=torch.float32)
    linears = {role: block.linear(role) for role in block.paths}
    with torch.inference_mode():
        expected = block.call.run(block.module)
    calls: list[str] = []
    with watched(block.module, block.name, block.groups) as lookup:

        def show(role: str, x: torch.Tensor) -> None:
            calls.append(role)
            assert x.is_inference()
            trace = lookup(block.paths[role])
            assert trace is not None
            if role in ("q", "up"):
                assert trace.gradient(0).shape == (14, linears[role].out_features)

        with block.hooked(show), torch.inference_mode():
            found = block.call.run(block.module)
    assert torch.equal(found, expected)
    assert sorted(calls) == sorted(block.paths)
    assert all(block.linear(role) is linear for role, linear in linears.items())
    assert all(not parameter.requires_grad for parameter in block.module.parameters())


def test_gradients_do_not_enter_a_graph_outside() -> None:
    """In the backward walk the block itself runs with gradients."""
    block = opened("llama")
    hidden = block.call.hidden.clone().requires_grad_()
    with watched(block.module, block.name, block.groups) as lookup:

        def show(role: str, _: torch.Tensor) -> None:
            trace = lookup(block.paths[role])
            assert trace is not None
            if role == "k":
                assert not trace.gradient(1).requires_grad

        with block.hooked(show):
            y = block.call.at(hidden).run(block.module)
    (found,) = torch.autograd.grad(y.sum(), hidden)
    (plain,) = torch.autograd.grad(block.call.at(hidden).run(block.module).sum(), hidden)
    assert torch.equal(found, plain)


def test_one_backward_serves_all_linears() -> None:
    block, found = opened("llama"), {}

    def use(trace: AttentionTrace) -> None:
        gradients = trace.unit.run().gradients
        assert not gradients
        first = trace.gradient(5)
        assert set(gradients[5, True]) == {"q_proj", "k_proj", "v_proj"}
        assert trace.gradient(5) is not trace.gradient(6)
        found["same"] = torch.equal(first, trace.gradient(5))
        found["other"] = torch.equal(first, trace.gradient(6))
        weights = torch.arange(7.0)
        found["weighted"] = torch.equal(first, trace.gradient(5, weights))

    block.traced("k", use)
    assert found == {"same": True, "other": False, "weighted": False}


def test_what_has_closed_forms() -> None:
    expected = {
        ("llama", 0, "q"): True, ("llama", 0, "v"): True, ("llama", 0, "k"): False,
        ("qwen3", 0, "q"): True, ("gemma2", 0, "q"): True, ("gpt2", 0, "v"): True,
        ("olmo2", 0, "q"): False,  # one norm over all heads
        ("olmo2", 0, "v"): True, ("gpt_neox", 0, "qkv"): False,
        ("qwen3_next", 1, "q"): False,  # a gate behind the heads
    }  # fmt: skip
    found = {}
    for name, index, role in expected:
        block = opened(name, index, dtype=torch.float32)
        key = name, index, role
        block.traced(role, lambda trace, key=key: found.update({key: trace.exact}))
    assert found == expected


def test_an_mlp_in_the_block_itself_does_not_take_the_attention() -> None:
    block = opened("opt")
    kinds = {}
    with watched(block.module, block.name, block.groups) as lookup:

        def show(role: str, _: torch.Tensor) -> None:
            trace = lookup(block.paths[role])
            assert trace is not None
            kinds[role] = trace.attends, trace.last

        with block.hooked(show), torch.inference_mode():
            block.call.run(block.module)
    assert kinds == {
        **{role: (True, False) for role in "qkv"},
        "o": (True, True), "up": (False, False), "down": (False, True),
    }  # fmt: skip
    assert isinstance(block.module, nn.Module)


def test_a_model_may_write_into_what_a_linear_gives() -> None:
    block, found = opened("llama"), {}

    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(3)

    block.module.mlp.act_fn = InPlace()
    block.traced("up", lambda trace: found.update(slope=trace.slope()))
    gate = block.linear("gate")
    block.traced("gate", lambda trace: found.update(x=trace.unit.call[0][0].flatten(0, 1)))
    torch.testing.assert_close(found["slope"], 3 * found["x"].clone() @ gate.weight.T)
