"""The kernels as operators of torch: what they return is known without running them.

No operator asks the device for anything, so all of them may be captured in CUDA graphs.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from aptq.kernels.triton import code, fields
from aptq.kernels.triton.layout import TILES, Layout
from aptq.kernels.triton.tuning import Setting, chosen

INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, for tests: PTX cannot be interpreted
NARROW, RUNS = 128, 4  # columns of a step, and steps, of programs that multiply with factors
NEVER = 1 << 30  # an output row that does not come
EXPANDED = 64  # rows of the weight that a program decodes at once


@torch.library.custom_op("aptq::multiply", mutates_args=())
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
    """x bfloat16 or float16 [rows, columns] contiguous @ weight.T + bias -> [rows, out].

    Where they are given, x @ right.T @ left is added, right [rank, columns] and left [rank, out].
    With edges, first rows of a second and third of the layers that were joined (multiples of 128),
    right is [their ranks and what was padded, columns] and each layer has its own rank of it.
    """
    how = Layout(*layout)
    added = None if left is None or right is None else (left, right, edges or ())
    return run(x, codes, counts, scale, zero, bias, how, chosen(how, len(x), x.device), added)


@multiply.register_fake
def _(
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
    return x.new_empty(x.shape[0], layout[0])


def run(
    x: Tensor,
    codes: Tensor,
    counts: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    setting: Setting,
    added: tuple[Tensor, Tensor, Sequence[int]] | None = None,
) -> Tensor:
    """What `multiply` does, with a given setting; added: left, right and edges."""
    rows, out = len(x), layout.out
    y = x.new_empty(rows, out)
    if y.numel() == 0:
        return y
    blocks = triton.cdiv(layout.columns, layout.block)
    per = triton.cdiv(blocks, setting.splits)
    splits = triton.cdiv(blocks, per)
    sums = y if splits == 1 else x.new_empty(splits, rows, out, dtype=torch.float32)
    offset, last = scale if zero is None else zero, x if bias is None else bias
    parts, left, right, rank, ranks, heads, edges = x, x, x, 0, 0, 0, [NEVER, NEVER]
    if added is not None:
        left, right, (*edges,) = added
        edges, rank, ranks = [*edges, NEVER, NEVER], len(left), len(right)
        heads = triton.cdiv(layout.columns, NARROW * RUNS)
        parts = x.new_empty(heads, rows, ranks, dtype=torch.float32)
    tiles, batches = triton.cdiv(out, setting.rows), triton.cdiv(rows, setting.batch)
    assert batches <= TILES or (splits == 1 and not rank), (rows, setting)
    with torch.cuda.device_of(x):
        code.multiply[heads + tiles, splits, batches](
            x, codes, counts, scale, offset, last, parts, left, right, sums, y,
            counts[layout.tiles :], heads, *edges[:2], layout.runs, rows, out, layout.columns,
            layout.padded, per, layout.bits, layout.chunk, layout.group, layout.zero,
            bias is not None, rank, ranks, layout.columns % layout.block == 0, setting.rows,
            setting.batch, splits > 1, NARROW, RUNS, not INTERPRETED, setting.warps,
            num_warps=setting.warps, num_stages=setting.stages,
        )  # fmt: skip
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
        fields.expand[grid](
            codes, scale, scale if zero is None else zero, y, how.runs, start, stop,
            how.columns, how.padded, how.bits, how.chunk, how.group, how.zero, EXPANDED,
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
