"""The GPU kernels' operators in plain torch, to test anywhere what is built on them."""

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.kernels import triton
from aptq.kernels.reference import Kernel
from aptq.kernels.triton.layer import Fused
from aptq.kernels.triton.layout import Buffers, Layout

CALLS: list[int] = []  # rows of the weights of all products so far


def _weight(buffers: Buffers, layout: Layout) -> Tensor:
    kernel = Fused.__new__(Fused)
    Kernel.__init__(kernel, (layout.out, layout.columns))
    kernel._hold(layout, buffers)
    return kernel.rows(torch.arange(layout.out)).double()


@torch.library.custom_op("aptq_plain::multiply", mutates_args=())
def multiply(
    x: Tensor,
    codes: Tensor,
    counts: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    layout: Sequence[int],
    left: Tensor | None = None,
    right: Tensor | None = None,
    edges: Sequence[int] | None = None,
) -> Tensor:
    """As launch.multiply, summed in float64: the order of sums hardly shows."""
    CALLS.append(layout[0])
    weight = _weight(Buffers(codes, counts, scale, zero), Layout(*layout))
    y = F.linear(x.double(), weight, None if bias is None else bias.double())
    if left is not None and right is not None:
        rank, inner = len(left), x.double() @ right.double().T
        for own, (first, last) in enumerate(pairwise([0, *(edges or ()), layout[0]])):
            few = inner[:, own * rank : own * rank + rank]
            y[:, first:last] += few @ left.double()[:, first:last]
    return y.to(x.dtype)


@multiply.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    layout = others[5]
    assert isinstance(layout, Sequence)
    return x.new_empty(len(x), layout[0])


def expand(
    like: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    layout: Sequence[int],
    start: int,
    stop: int,
) -> Tensor:
    """As launch.expand."""
    weight = _weight(Buffers(codes, codes, scale, zero), Layout(*layout))
    return weight[start:stop].to(like.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts the operators in place of the kernels' own; the rows of every weight multiplied."""
    CALLS.clear()
    operators = SimpleNamespace(multiply=multiply, expand=expand)
    monkeypatch.setattr(triton, "launch", operators, raising=False)
    return CALLS
