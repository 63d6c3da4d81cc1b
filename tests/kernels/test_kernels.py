"""Kernels: every one that claims a part computes what the decoded weight computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from aptq.core.parts import Dense, Part, Quantized
from aptq.kernels.cpu import GROWTH, INT4_ROWS, INT8_ROWS, Int4, Int8, layout
from aptq.kernels.dispatch import KERNELS, matmul, prepare
from aptq.kernels.reference import Kernel, Reference, Tiled
from tests.kernels.samples import make, randn, sample

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def off(y: Tensor, x: Tensor, part: Part, bias: Tensor | None = None) -> float:
    """Distance of y to the exact product, as a share of it.

    Of what it would be without cancellation where terms cancel: a single output may come near 0.
    """
    weight = part.dense().double()
    exact = x.double() @ weight.T
    exact = exact if bias is None else exact + bias.double()
    usual = (x.double().square() @ weight.square().T).sqrt().norm().clamp_min(1e-12)
    return float((y.double() - exact).norm() / exact.norm().maximum(usual))


def kernels_for(part: Part, dtype: torch.dtype) -> list[type[Kernel]]:
    return [kernel for kernel in KERNELS if kernel.supports(part, CPU, dtype)]


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from(["row", "g1", "g7", "g16", "g32", "g64", "g96", "g128"]),
    suffix=st.sampled_from(["", "-z", "-fz", "-bf16", "-z-bf16"]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140)) | st.just((80, 128)),
    rows=st.sampled_from([0, 1, 5, 40, 130]),
    dtype=st.sampled_from(list(ROUNDING)),
    biased=st.booleans(),
)
def test_every_kernel_agrees_with_the_decoded_weight(
    bits: int,
    group: str,
    suffix: str,
    shape: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    biased: bool,
) -> None:
    part = sample(f"int{bits}-{group}{suffix}", *shape)
    x = randn(rows, shape[1], seed=1).to(dtype)
    bias = randn(shape[0], seed=2).to(dtype) if biased else None
    for kernel in kernels_for(part, dtype):
        y = kernel.prepare(part, dtype)(x, bias)
        assert y.shape == (rows, shape[0])
        assert y.dtype == dtype
        if rows:
            assert off(y, x, part, bias) < ROUNDING[dtype], kernel


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("text", ["int4-g16-z", "int3-g5-fz", "int8-row", "bf16"])
def test_the_reference_is_the_dense_layer_bit_for_bit(text: str, dtype: torch.dtype) -> None:
    part, x, bias = sample(text, 9, 21), randn(3, 21).to(dtype), randn(9).to(dtype)
    y = prepare(part, dtype, "reference")(x, bias)
    assert torch.equal(y, F.linear(x, part.dense(dtype), bias))


def test_tiles_hold_the_weights_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aptq.kernels.reference.CACHE_TILE", 50)
    part = sample("int3-g5-z", 9, 21)
    x = torch.eye(21)  # no sums: any difference is in the weights
    assert torch.equal(Tiled.prepare(part, torch.float32)(x), part.dense().T)


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "expected"),
    [
        ("int4-g64-z", (48, 128), torch.bfloat16, Int4),
        ("int4-g32-fz", (16, 96), torch.bfloat16, Int4),
        ("int4-g128", (16, 192), torch.bfloat16, Int4),  # splits into groups of 64
        ("int4-row-z", (16, 1024), torch.bfloat16, Int4),  # splits into groups of 256
        ("int4-row-z", (16, 96), torch.bfloat16, Tiled),  # groups of 32 would cost a fifth more
        ("int4-g64-z", (40, 128), torch.bfloat16, Tiled),  # rows no multiple of 16
        ("int4-g48-z", (48, 96), torch.bfloat16, Tiled),
        ("int4-g64-z", (48, 128), torch.float32, Tiled),
        ("int4-g64-z", (48, 128), torch.float16, Tiled),
        ("int8-row", (3, 48), torch.bfloat16, Int8),
        ("int8-g16-bf16", (3, 48), torch.bfloat16, Int8),
        ("int8-g999", (3, 48), torch.bfloat16, Int8),
        ("int8-row", (3, 40), torch.bfloat16, Tiled),  # ATen would read past the end
        ("int8-g64", (3, 96), torch.bfloat16, Tiled),
        ("int8-row-z", (3, 48), torch.bfloat16, Tiled),
        ("int3-g64-z", (48, 128), torch.bfloat16, Tiled),
        ("bf16", (48, 128), torch.bfloat16, Reference),
    ],
)
def test_dispatch(
    text: str, shape: tuple[int, int], dtype: torch.dtype, expected: type[Kernel]
) -> None:
    part = sample(text, *shape)
    kernel = prepare(part, dtype)
    assert type(kernel) is expected
    held = sum(buffer.nbytes for buffer in kernel.buffers())
    assert held <= GROWTH * part.nbytes
    assert type(prepare(part, dtype, "reference")) is Reference


@pytest.mark.parametrize("text", ["int4-g64-z", "int4-g32-fz", "int8-g32"])
@pytest.mark.parametrize("out", [16, 112, 208])
def test_few_and_many_rows_take_equal_weights(text: str, out: int) -> None:
    part = sample(text, out, 128)
    kernel = (Int8 if text.startswith("int8") else Int4).prepare(part, torch.bfloat16)
    x = randn(max(INT4_ROWS, INT8_ROWS), 128).bfloat16()
    many, few = kernel(x), kernel(x[:5])
    assert off(many, x, part) < ROUNDING[torch.bfloat16]
    assert float((many[:5] - few).float().norm() / few.float().norm()) < ROUNDING[torch.bfloat16]


def test_the_int4_layout_of_this_machine_is_known() -> None:
    order = layout()
    assert order is not None
    codes = torch.randint(0, 16, (3 * order.block, 64), generator=torch.Generator().manual_seed(0))
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(order.unpack(packed, 64), codes.T.to(torch.uint8))


def test_zero_weights_stay_zero_in_int4() -> None:
    weight = randn(32, 32)
    weight[:, ::2] = 0
    part = make("int4-g32-z", weight)
    assert isinstance(part, Quantized)
    zero = part.scales().zero
    assert zero is not None
    exact = torch.isin((zero.int() - 8).abs(), torch.tensor([0, 1, 2, 4, 8]))[:, 0]
    assert exact.float().mean() > 0.5
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[:, ::2] = 1000
    y = prepare(part, torch.bfloat16)(x)[0]
    assert not y[exact].any()
    assert float(y.abs().max()) < 2**-8 * 16_000 * float(part.scale.abs().max()) * 8


@pytest.mark.parametrize("text", ["int8-row", "int8-g64", "int8-row-z", "int8-g64-z"])
def test_int8_survives_inputs_with_a_mean_and_heavy_tails(text: str) -> None:
    weight = randn(64, 512) * randn(64, 512, seed=1).exp()
    part = make(text, weight)
    x = randn(4, 512, seed=2).relu().bfloat16()
    assert off(matmul(x, part), x, part) < ROUNDING[torch.bfloat16]


def test_activations_need_no_alignment() -> None:
    part = sample("int8-row", 16, 48)
    x = randn(3 * 48 + 1).bfloat16()[1:].view(3, 48)
    assert x.data_ptr() % 32
    assert off(matmul(x, part), x, part) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("text", ["int4-g32-z", "int8-row", "int3-g7"])
def test_gradients_reach_the_input(text: str) -> None:
    part = sample(text, 16, 64)
    x = randn(2, 64).bfloat16().requires_grad_()
    prepare(part, torch.bfloat16)(x).float().sum().backward()
    assert x.grad is not None
    exact = part.dense().sum(0)
    assert float((x.grad[0].float() - exact).norm() / exact.norm()) < 0.02


def test_leading_dimensions() -> None:
    part, x = sample("int4-g32-z", 16, 64), randn(2, 3, 64).transpose(0, 1)
    assert torch.allclose(matmul(x, part), x @ part.dense().T, atol=1e-5)


@pytest.mark.parametrize("text", ["int4-g32-z", "int8-row", "int3-g7", "bf16"])
def test_a_change_of_dtype_leaves_the_storage_alone(text: str) -> None:
    kernel = prepare(sample(text, 16, 64), torch.bfloat16)
    before = {name: buffer.clone() for name, buffer in kernel.named_buffers()}
    for name, buffer in kernel.float().half().named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("text", ["int4-g32-z", "int8-row"])
def test_another_dtype_of_activations_is_refused(text: str) -> None:
    kernel = prepare(sample(text, 16, 64), torch.bfloat16)
    with pytest.raises(ValueError, match=r"(?s)prepared for another dtype.*float32.*load the"):
        kernel(randn(1, 64))


def test_dense_parts_are_plain_layers() -> None:
    part, x = Dense(randn(5, 7).bfloat16()), randn(2, 7)
    assert torch.equal(matmul(x, part), F.linear(x, part.dense()))
