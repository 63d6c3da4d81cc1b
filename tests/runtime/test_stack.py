"""Stacking: layers that read the same tensor are found, and stay what they are."""

import copy

import pytest
import torch
from torch import Tensor, nn

from aptq.kernels.addends import Factors
from aptq.kernels.stacked import Share
from aptq.kernels.triton.layer import ROWS, Fused
from aptq.runtime import adapter
from aptq.runtime.embedding import PackedEmbedding, TiedHead
from aptq.runtime.generate import Growing
from aptq.runtime.graph import Static, applies
from aptq.runtime.linear import PackedLinear
from aptq.runtime.stack import stack, watched
from tests.kernels.plain import calls
from tests.kernels.samples import make
from tests.runtime.fused import COUPLED, MIXED, fused_model, pack, same_steps
from tests.runtime.test_graph import tokens
from tests.tiny import tiny_tokens

__all__ = ["calls"]


def stacks(model: nn.Module) -> list[list[str]]:
    """Names of the layers that share a kernel, in the order of the product."""
    found: dict[int, list[tuple[int, str]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear) and isinstance(share := module.parts[0], Share):
            found.setdefault(id(share.stack), []).append((share.index, path.rpartition(".")[2]))
    return [[name for _, name in sorted(group)] for group in found.values()]


ALL = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
FEW = [["q_proj", "k_proj"]] * 2


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("grids", "wanted"), [(COUPLED, ALL), (MIXED, FEW)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_shows_what_can_be_stacked(
    calls: list[int], batch: int, grids: dict[str, str], wanted: list[list[str]], biased: bool
) -> None:
    model, ids = fused_model(grids, attention_bias=biased), tiny_tokens(batch, 9)
    apart = Static(model, batch, 21, apart=True)
    exact, grown = tokens(apart, ids, 12), tokens(Growing(model), ids, 12)
    assert exact.unique().numel() > 3
    assert stacks(model) == []
    calls.clear()
    apart(ids[:, :1])
    assert len(calls) == 14
    forward = Static(model, batch, 22)
    assert torch.equal(tokens(forward, ids, 12), exact)
    assert stacks(model) == wanted
    calls.clear()
    forward(ids[:, :1])
    assert len(calls) == 14 - sum(len(group) - 1 for group in wanted)
    shares = [id(module) for module in model.modules() if isinstance(module, Share)]
    assert torch.equal(tokens(Static(model, batch, 21), ids, 12), exact)
    assert torch.equal(tokens(Growing(model), ids, 12), grown)
    assert shares == [id(module) for module in model.modules() if isinstance(module, Share)]


def test_long_prompts_and_memory(calls: list[int]) -> None:
    model, ids = fused_model(COUPLED), tiny_tokens(1, ROWS + 8)
    plain = copy.deepcopy(model)

    def held(model: nn.Module) -> int:
        return sum(t.nbytes for name, t in model.named_buffers() if not name.endswith("counts"))

    exact = tokens(Static(plain, 1, ROWS + 20, apart=True), ids, 12)
    before = held(model)
    for _ in range(2):
        assert torch.equal(tokens(Static(model, 1, ROWS + 20), ids, 12), exact)
        assert held(model) == before
    assert stacks(model) == ALL
    other = copy.deepcopy(model)
    assert held(other) == before
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(tokens(Static(other.to(torch.bfloat16), 1, ROWS + 20), ids, 12), exact)


def test_adapters_stay_apart(calls: list[int]) -> None:
    model, ids = fused_model(COUPLED), tiny_tokens(1, 9)
    linear = model.model.layers[0].self_attn.q_proj

    def put(seed: int) -> None:
        adapter.detach(model)
        draw = torch.Generator().manual_seed(seed)
        sides = (torch.randn(2, 256, generator=draw).bfloat16() for _ in range(2))
        linear.parts.append(Factors(*sides))
        linear.adapted = True

    put(0)
    exact = tokens(Static(model, 1, 21, apart=True), ids, 12)
    assert torch.equal(tokens(Static(model, 1, 21), ids, 12), exact)
    assert stacks(model) == ALL
    adapter.detach(model)
    bare = tokens(Static(model, 1, 21), ids, 12)
    assert not torch.equal(bare, exact)
    assert torch.equal(bare, tokens(Static(fused_model(COUPLED), 1, 21, apart=True), ids, 12))
    put(0)
    assert torch.equal(tokens(Static(model, 1, 21), ids, 12), exact)
    assert next(linear.buffers()).device.type == "cpu"  # where an adapter is put


class Reading(nn.Module):
    """Sizes as given, all of 64 columns; how it reads its input is up to `each`."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        linears = [nn.Linear(64, out, bias=False) for out in sizes]
        self.layers = nn.ModuleList(pack(linear, "int4-g32-z") for linear in linears)
        self.each = lambda x: x

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(self.each(x)) for layer in self.layers]


def observed(model: nn.Module, times: int = 1) -> list[int]:
    with torch.no_grad():
        x = torch.randn(1, 64).bfloat16()
        with watched(model) as found:
            for _ in range(times):
                model(x)
        stack(found)
    return [len(readers.layers) for readers in found]


def test_only_the_very_same_contents_count(calls: list[int]) -> None:
    model = Reading(32, 32, 32)
    model.each = lambda x: x + 0  # freed at once: the next one may have its address and id
    assert observed(model) == [1, 1, 1]
    model.each = lambda x: x.add_(1)
    assert observed(model) == [1, 1, 1]
    model.each = lambda x: x.view(1, 64)
    assert observed(model) == [1, 1, 1]
    assert not any(isinstance(module, Share) for module in model.modules())
    assert not any(layer._forward_pre_hooks for layer in model.layers)
    model.each = lambda x: x
    assert observed(model, times=2) == [3]
    assert sum(isinstance(module, Share) for module in model.modules()) == 3
    assert observed(model) == []


def test_odd_sizes_factors_and_tied_heads(calls: list[int]) -> None:
    model = Reading(27, 32, 30, 48, 16)
    left, right = torch.randn(16, 16).bfloat16(), torch.randn(16, 64).bfloat16()
    first = model.layers[4].parts[0]
    assert isinstance(first, Fused)
    assert first.absorb(Factors(left, right))
    x = torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        exact = model(x)
        observed(model)
        kinds = [isinstance(layer.parts[0], Share) for layer in model.layers]
        assert kinds == [True, True, False, True, False]
        assert [layer.parts[0].index for layer in model.layers[:2]] == [2, 0]
        for y, wanted in zip(model(x), exact, strict=True):
            assert torch.equal(y, wanted)
    part = make("int4-g32-z", torch.randn(32, 64))
    embedding = PackedEmbedding([part], torch.bfloat16)
    embedding.parts[0] = Fused.prepare(part, torch.bfloat16)
    tied = Reading(32, 32)
    tied.layers.append(TiedHead(embedding, None))
    assert observed(tied) == [2]
    assert isinstance(embedding.parts[0], Fused)


def test_a_failing_prompt_leaves_no_hooks(calls: list[int]) -> None:
    model = fused_model(COUPLED)
    handle = model.model.norm.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        Static(model, 1, 21)(tiny_tokens(1, 9))
    handle.remove()
    assert stacks(model) == []
    assert not any(
        module._forward_pre_hooks for module in model.modules() if isinstance(module, PackedLinear)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("grids", [COUPLED, MIXED])
def test_stacked_steps_on_a_gpu(grids: dict[str, str], batch: int, biased: bool) -> None:
    pytest.importorskip("triton")
    model = fused_model(grids, "cuda", attention_bias=biased)
    ids = tiny_tokens(batch, 9).cuda()
    assert applies(model, batch, 24)
    alone = copy.deepcopy(model)
    apart, joined = Static(alone, batch, 40, apart=True), Static(model, batch, 40)
    same_steps(apart, joined, ids)
    assert joined.graph is not None
    assert apart.graph is not None
    assert len(stacks(model)) == len(ALL if grids is COUPLED else FEW)
    assert stacks(alone) == []


@pytest.mark.gpu
def test_a_graph_outlives_what_it_was_made_of() -> None:
    pytest.importorskip("triton")
    model, ids = fused_model(COUPLED, "cuda"), tiny_tokens(1, 9).cuda()
    exact = tokens(Static(model, 1, 40, apart=True), ids, 24)
    apart = Static(model, 1, 40, apart=True)
    first = tokens(apart, ids, 12)
    assert apart.graph is not None
    tokens(Static(model, 1, 40), ids, 12)  # frees what the graph of the other one reads
    for _ in range(64):
        torch.randn(1 << 18, device="cuda")
    rest = tokens(apart, first[:, -1:], 12)
    assert torch.equal(torch.cat([first, rest], 1), exact)
