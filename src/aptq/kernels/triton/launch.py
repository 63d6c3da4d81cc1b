"""The kernels as operators of torch: what they return is known without running them.

No operator asks the device for anything, so all of them may be captured in CUDA graphs.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from aptq.kernels.triton import code
from aptq.kernels.triton.layout import Layout
from aptq.kernels.triton.tuning import Setting, chosen

INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, for tests: PTX cannot be interpreted
EXPANDED = 64  # rows of the weight that a program decodes at once
ADDED = 256  # outputs that a program sums up


@torch.library.custom_op("aptq::multiply", mutates_args=())
def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    """x bfloat16 or float16 [rows, columns] contiguous @ weight.T + bias -> [rows, out]."""
    how = Layout(*layout)
    return run(x, codes, scale, zero, bias, how, chosen(how, len(x), x.device))


@multiply.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    return x.new_empty(x.shape[0], layout[0])


def run(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    setting: Setting,
) -> Tensor:
    """What `multiply` does, with a given setting."""
    rows, out = len(x), layout.out
    y = x.new_empty(rows, out)
    if y.numel() == 0:
        return y
    blocks = triton.cdiv(layout.columns, layout.block)
    per = triton.cdiv(blocks, setting.splits)
    splits = triton.cdiv(blocks, per)
    sums = y if splits == 1 else x.new_empty(splits, rows, out, dtype=torch.float32)
    offset, last = scale if zero is None else zero, x if bias is None else bias
    grid = (triton.cdiv(out, setting.rows), splits, triton.cdiv(rows, setting.batch))
    with torch.cuda.device_of(x):
        code.multiply[grid](
            x, codes, scale, offset, last, sums, layout.units(0), rows, out, layout.columns,
            layout.padded, per, *layout.planes, layout.chunk, layout.group, layout.zero,
            bias is not None and splits == 1, layout.columns % layout.block == 0,
            setting.rows, setting.batch, not INTERPRETED,
            num_warps=setting.warps, num_stages=setting.stages,
        )  # fmt: skip
        if splits > 1:
            size, has = rows * out, bias is not None
            every = (triton.cdiv(size, ADDED),)
            code.add_up[every](sums, last, y, size, out, splits, has, ADDED, num_warps=2)
    return y


@torch.library.custom_op("aptq::expand", mutates_args=())
def expand(
    like: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    layout: Sequence[int],
    start: int,
    stop: int,
) -> Tensor:
    """Rows start..stop-1 of the weight, [stop - start, columns] in the dtype of `like`."""
    how = Layout(*layout)
    y = like.new_empty(stop - start, how.columns)
    grid = (how.columns // how.chunk, triton.cdiv(stop - start, EXPANDED))
    with torch.cuda.device_of(like):
        code.expand[grid](
            codes, scale, scale if zero is None else zero, y, how.units(0), start, stop,
            how.columns, how.padded, *how.planes, how.chunk, how.group, how.zero, EXPANDED,
        )  # fmt: skip
    return y


@expand.register_fake
def _(
    like: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    layout: Sequence[int],
    start: int,
    stop: int,
) -> Tensor:
    return like.new_empty(stop - start, layout[1])
