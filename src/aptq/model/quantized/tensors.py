"""What every method checks in the tensors of a linear, and how it decodes them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import Spec
from aptq.core.rounding import Scales, decode
from aptq.model.sources import refuse

ADVICE = "start from the original model, or export it again with a current version of its tool"
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """dtype and shape by last name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def misfit(layer: str, tensors: Mapping[str, Tensor], schemes: str) -> ValueError:
    """The error for tensors that fit none of the schemes of config.json."""
    found = specs(tensors).items()
    shown = ", ".join(f"{name} {str(dtype)[6:]} {list(shape)}" for name, (dtype, shape) in found)
    return ValueError(f"a quantized layer is not of {schemes}\n{layer}: {shown}\n{ADVICE}")


def decoded(
    layer: str, codes: Tensor, scales: Scales, bits: int, index: Tensor, dtype: torch.dtype
) -> Tensor:
    """The weight [out, in] in dtype of codes uint8 [out, in], column i being of group index[i].

    Raises ValueError for groups that do not exist.
    """
    groups, index = scales.scale.shape[1], index.long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        shown = f"{layer}: from {int(index.min())} to {int(index.max())} of {groups} groups"
        refuse("g_idx names groups that do not exist", shown, ADVICE)
    # Groups of one column have the numbers of their columns: decode looks up any order.
    grid = Grid(f"int{bits}", group=1, zero="none" if scales.zero is None else "int")
    return decode(codes, scales, grid, columns=index, dtype=dtype)
