"""Factors and single weights: what their kernels compute is the part's dense product."""

import pytest
import torch

from aptq.core.parts import Quantized
from aptq.core.plan import PartSpec
from aptq.kernels.addends import Factors, Gathered
from aptq.kernels.dispatch import matmul, prepare
from aptq.runtime.linear import PackedLinear
from tests.core.test_sums import SHAPE, made

TEXTS = ["r1", "r5", "r3@int8-row", "o0.6%", "o7%", "o33.33%", "o99%"]


@pytest.mark.parametrize("rows", [0, 1, 3, 13, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_reference(text: str, dtype: torch.dtype, rows: int) -> None:
    part, _ = made(text)
    x = torch.randn(rows, SHAPE[1], dtype=dtype)
    bias = torch.randn(SHAPE[0], dtype=dtype)
    wanted = x.float() @ part.dense().T
    near = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(matmul(x, part).float(), wanted, **near)
    kernel = prepare(part, dtype)
    assert type(kernel) is (Factors if PartSpec.parse(text).rank else Gathered)
    torch.testing.assert_close(kernel(x, bias).float(), wanted + bias.float(), **near)
    torch.testing.assert_close(matmul(x, part, "reference").float(), wanted, **near)


def test_a_layer_of_all_three() -> None:
    from aptq.core.grid import Grid
    from aptq.core.parts import nearest_part

    parts = [made(text)[0] for text in ("o7%", "r5")]
    parts.insert(0, nearest_part(torch.randn(SHAPE), Grid.parse("int4-g7-z")))
    assert isinstance(parts[0], Quantized)
    linear, x = PackedLinear(parts, torch.randn(SHAPE[0])), torch.randn(2, 3, SHAPE[1])
    assert linear.bias is not None
    wanted = x @ sum(part.dense() for part in parts).T + linear.bias  # type: ignore[union-attr]
    torch.testing.assert_close(linear(x), wanted)
    linear.prepare(torch.float32)
    torch.testing.assert_close(linear(x), wanted)
