"""Stacked kernels: the products of the single ones, one call for all, never an older result."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from aptq.core.parts import Quantized
from aptq.kernels.addends import Factors
from aptq.kernels.reference import Kernel
from aptq.kernels.stacked import Share, Stacked
from aptq.kernels.triton.layer import ROWS, Fused
from tests.kernels.plain import calls
from tests.kernels.samples import make

__all__ = ["calls"]
SIZES = (32, 48, 27)
GRIDS = ("int2-g32", "int3-g64-z", "int4-g64-z", "int5-g32-fz", "int6-row", "int8-g64-z")


def fused(text: str, out: int) -> Fused:
    part = make(text, 0.05 * torch.randn(out, 128))
    assert isinstance(part, Quantized)
    return Fused(part)


class Layers(nn.Module):
    """Three kernels, alone and stacked, with biases or without."""

    def __init__(self, text: str = "int4-g64-z", biased: bool = True) -> None:
        super().__init__()
        self.alone = nn.ModuleList(fused(text, out) for out in SIZES)
        self.biases = [torch.randn(out).bfloat16() if biased else None for out in SIZES]
        stack = Stacked(list(self.alone), self.biases)  # type: ignore[arg-type]
        self.shares = nn.ModuleList(Share(stack, index) for index in range(3))

    def wanted(self, index: int, x: Tensor) -> Tensor:
        kernel = self.alone[index]
        assert isinstance(kernel, Kernel)
        return kernel.forward(x.reshape(-1, 128), self.biases[index])

    def got(self, index: int, x: Tensor) -> Tensor:
        share = self.shares[index]
        assert isinstance(share, Share)
        return share.begin(x, x.reshape(-1, 128), self.biases[index])

    def check(self, index: int, x: Tensor) -> None:
        assert torch.equal(self.got(index, x), self.wanted(index, x))

    @property
    def stack(self) -> Stacked:
        share = self.shares[0]
        assert isinstance(share, Share)
        return share.stack


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 128).bfloat16()


@pytest.mark.parametrize("text", GRIDS)
def test_the_joined_weight_is_all_weights(text: str) -> None:
    kernels = [fused(text, out) for out in SIZES]
    joined = Fused.join(kernels)
    assert joined.shape == (sum(SIZES), 128)
    rows = torch.arange(sum(SIZES))
    each = torch.cat([kernel.rows(torch.arange(kernel.shape[0])) for kernel in kernels])
    assert torch.equal(joined.rows(rows), each)
    whole = sum(kernel.layout.nbytes for kernel in kernels)
    assert joined.layout.nbytes == whole == sum(
        t.nbytes for name, t in joined.named_buffers() if name != "counts"
    )  # fmt: skip
    assert joined.counts.shape == (joined.layout.counters,)
    assert not joined.counts.any()


@pytest.mark.parametrize("rows", [2, ROWS])
def test_joined_kernels_keep_their_own_factors(calls: list[int], rows: int) -> None:
    kernels = [fused("int4-g64-z", out) for out in (128, 256, 40)]
    for kernel in kernels:
        left, right = torch.randn(16, kernel.shape[0]), 0.1 * torch.randn(16, 128)
        assert kernel.absorb(Factors(left.bfloat16(), right.bfloat16()))
    x, joined = torch.randn(rows, 128).bfloat16(), Fused.join(kernels)
    assert joined.right is not None
    assert joined.right.shape == (64, 128)
    exact = torch.cat([kernel.forward(x) for kernel in kernels], 1)
    torch.testing.assert_close(joined.forward(x), exact, atol=5e-2, rtol=2e-2)
    torch.testing.assert_close(
        joined.decoded(x, None, 100, 400), exact[:, 100:400], atol=5e-2, rtol=2e-2
    )
    share = Share(Stacked(kernels, [None] * 3), 1)
    torch.testing.assert_close(share.begin(x, x, None), exact[:, 128:384], atol=5e-2, rtol=2e-2)
    with pytest.raises(AssertionError, match="128"):
        Fused.join([kernels[2], kernels[0]])
    with pytest.raises(AssertionError, match="128"):
        Fused.join([kernels[0]] * 4)


def test_what_cannot_be_joined() -> None:
    with pytest.raises(AssertionError, match="27"):
        Fused.join([fused("int4-g64-z", 27), fused("int4-g64-z", 32)])
    for other in ("int3-g64-z", "int4-g32-z", "int4-g64", "int4-g64-z-bf16"):
        with pytest.raises(AssertionError, match="Layout"):
            Fused.join([fused("int4-g64-z", 32), fused(other, 32)])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(), (1, 1), (4, 1), (3,), (2, 5)])
def test_one_product_for_all(calls: list[int], shape: tuple[int, ...], biased: bool) -> None:
    layers = Layers(biased=biased)
    x = inputs(*shape)
    wanted = [layers.wanted(index, x) for index in range(3)]
    calls.clear()
    found = [layers.got(index, x) for index in range(3)]
    assert calls == [sum(SIZES)]
    for y, exact in zip(found, wanted, strict=True):
        assert torch.equal(y, exact)
        assert shape[-1:] not in ((3,), (5,)) or y.is_contiguous()
    assert layers.stack.x is None
    assert layers.stack.pieces == []


def test_any_order_and_any_input(calls: list[int]) -> None:
    layers, x, other = Layers(), inputs(1), inputs(1)
    for index in (2, 0, 0, 1, 2, 1, 1, 0, 2):
        layers.check(index, x)
    layers.check(0, x)
    layers.check(1, other)  # the third never came for x
    layers.check(2, x)
    layers.check(2, other)
    layers.check(2, x.clone())


def test_contents_that_change_in_place(calls: list[int]) -> None:
    layers, x = Layers(), inputs(1)
    layers.check(0, x)
    x.mul_(-2)
    layers.check(1, x)
    layers.check(2, x)
    x.zero_()
    layers.check(0, x)
    x.view(-1)[3:].add_(1)  # through a view
    layers.check(2, x)


def test_inference_tensors_count_no_versions(calls: list[int]) -> None:
    layers = Layers()
    with torch.inference_mode():
        x = inputs(1)
        layers.check(0, x)
        x.mul_(-2)
        layers.check(1, x)
        assert layers.stack.x is None


def test_a_freed_input_is_not_taken_for_another(calls: list[int]) -> None:
    layers = Layers()
    for _ in range(20):
        layers.check(0, inputs(1))  # what it was given is gone but for the stack
        layers.check(1, inputs(1))


def test_other_biases(calls: list[int]) -> None:
    layers, x = Layers(), inputs(1)
    for bias in (torch.randn(48).bfloat16(), None, torch.randn(48).bfloat16()):
        layers.biases[1] = bias
        for index in (0, 1, 2, 1, 0):
            layers.check(index, x)
    first = layers.biases[0]
    assert first is not None
    first.add_(1)
    for index in range(3):
        layers.check(index, x)


def test_many_rows_and_gradients_decode_their_own_rows(calls: list[int]) -> None:
    layers, x = Layers(), inputs(ROWS + 1)
    calls.clear()
    for index in (0, 1, 2):
        layers.check(index, x)
    for index in (2, 0):
        own, ours = (inputs(3).requires_grad_() for _ in range(2))
        ours.data.copy_(own.data)
        layers.wanted(index, own).float().square().sum().backward()  # type: ignore[no-untyped-call]
        layers.got(index, ours).float().square().sum().backward()  # type: ignore[no-untyped-call]
        assert own.grad is not None
        assert ours.grad is not None
        assert torch.equal(ours.grad, own.grad)
    assert calls == []
    assert layers.stack.x is None


def test_a_wrong_dtype_is_refused() -> None:
    layers = Layers()
    with pytest.raises(ValueError, match="prepared for another dtype"):
        layers.got(0, torch.randn(1, 128))


def test_weights_are_held_once(calls: list[int]) -> None:
    layers, x = Layers(), inputs(1)
    layers.alone = nn.ModuleList()
    held = sum(t.nbytes for t in layers.buffers())
    assert held == layers.stack.kernel.layout.nbytes + layers.stack.kernel.counts.nbytes
    assert not layers.state_dict()
    wanted = [layers.got(index, x) for index in range(3)]
    layers.got(0, x)  # copied with a product that waits
    copies = copy.deepcopy(layers)
    assert copies.stack.x is None
    assert len({id(share.stack) for share in copies.shares}) == 1  # type: ignore[union-attr]
    mine = {t.data_ptr() for t in layers.buffers()}
    assert not mine & {t.data_ptr() for t in copies.buffers()}
    assert sum(t.nbytes for t in copies.buffers()) == held
    for other in (copies, pickle.loads(pickle.dumps(layers)), layers.to(torch.float16)):
        assert other.stack.kernel.scale.dtype == torch.float16
        assert all(torch.equal(other.got(i, x), wanted[i]) for i in (1, 0, 2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_product_in_one_graph(calls: list[int], backend: str) -> None:
    layers, x = Layers(), inputs(4, 1)

    def step(x: Tensor) -> Tensor:
        q, k = layers.got(0, x), layers.got(1, x)
        z = x * 2
        return torch.cat([q, k, layers.got(2, x), layers.got(2, z), layers.got(0, z)], 1)

    wanted = step(x)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert torch.equal(compiled(x), wanted)
        calls.clear()
        for _ in range(3):
            assert torch.equal(compiled(x), wanted)
    assert calls == [sum(SIZES)] * 6
    layers.check(1, x)


@pytest.mark.gpu
@pytest.mark.parametrize("text", GRIDS)
@pytest.mark.parametrize("batch", [1, 4])
def test_stacked_products_on_a_gpu(text: str, batch: int) -> None:
    pytest.importorskip("triton")
    layers = Layers(text).cuda()
    layers.biases = [None if bias is None else bias.cuda() for bias in layers.biases]
    layers.stack.biases = [*layers.biases]
    x = inputs(batch, 1).cuda()
    for index in (0, 1, 2, 1):
        torch.testing.assert_close(
            layers.got(index, x), layers.wanted(index, x), atol=2e-2, rtol=2e-2
        )
    many = inputs(ROWS + 1).cuda()
    for index in range(3):
        torch.testing.assert_close(
            layers.got(index, many), layers.wanted(index, many), atol=2e-2, rtol=2e-2
        )
