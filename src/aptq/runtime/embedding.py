"""PackedEmbedding: an embedding whose rows stay packed; TiedHead: a head that reads its parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aptq.core.bits import unpack
from aptq.core.parts import Dense, Part, Quantized
from aptq.core.rounding import Scales, decode
from aptq.kernels.cpu import Int4, Int8, layout
from aptq.kernels.cpu_lanes import Lanes
from aptq.kernels.dispatch import Choice
from aptq.kernels.reference import CACHE_TILE, DEVICE_TILE, Reference
from aptq.kernels.triton.layer import Fused
from aptq.runtime.linear import Packed, PackedLinear


class PackedEmbedding(Packed):
    """y = (sum of the rows `ids` of the parts) * scale.  ids int64 [...] -> [..., width].

    Only the rows asked for are decoded.  Values have the dtype of the model, which `.to` changes.
    """

    like: Tensor  # empty: its dtype is that of the values

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__(parts)
        self.num_embeddings, self.embedding_dim = parts[0].shape
        self.scale = scale
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., width]."""
        dtype, pieces = self.like.dtype, []
        tile = CACHE_TILE if ids.device.type == "cpu" else DEVICE_TILE
        for some in ids.flatten().split(max(1, tile // self.embedding_dim)):
            first, *others = (kernel_rows(kernel, some) for kernel in self.parts)
            pieces.append(sum(others, start=first).to(dtype))
        y = torch.cat(pieces).view(*ids.shape, self.embedding_dim)
        # float32 first, then the dtype of the weight: the order in which transformers rounds it
        scale = float(torch.tensor(self.scale, dtype=torch.float32).to(dtype))
        return y if scale == 1.0 else y * scale

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scale={self.scale:g}"


class TiedHead(PackedLinear):
    """y = x @ weight.T + bias with the weight of a PackedEmbedding, which holds the only copy."""

    def __init__(self, embedding: PackedEmbedding, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.shared = (embedding,)  # in a tuple, so that its tensors are not registered twice
        self.out_features, self.in_features = embedding.num_embeddings, embedding.embedding_dim
        fixed = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", fixed)

    def prepare(self, dtype: torch.dtype, choice: Choice = "auto") -> None:
        """Every part by a kernel of its own, for the embedding reads them too."""
        Packed.prepare(self, dtype, choice)

    @property
    def parts(self) -> nn.ModuleList:  # type: ignore[override]
        """Those of the embedding, prepared for the head: it does nearly all of the work."""
        return self.shared[0].parts


def kernel_rows(kernel: nn.Module, rows: Tensor) -> Tensor:
    """Rows [n] int64 (any order, repeated too) of the weight in a kernel: float32 [n, columns].

    Int4 has rounded its scales to bfloat16, here as in its products.
    """
    if isinstance(kernel, Lanes | Fused):
        return kernel.rows(rows)
    if isinstance(kernel, Int4):
        return _int4_rows(kernel, rows)
    if isinstance(kernel, Int8):
        values = kernel.codes[:, rows].float() * kernel.scale[:, rows, None].float()
        return values.transpose(0, 1).flatten(1)
    assert isinstance(kernel, Reference), type(kernel)
    part = kernel.part
    if isinstance(part, Dense):
        return part.weight[rows].float()
    assert isinstance(part, Quantized), type(part)
    if part.grid.kind is not None:
        shape = (len(rows), part.shape[1])
        return Quantized(part.codes[rows], part.scale[rows], None, part.grid, shape).dense()
    codes = unpack(part.codes[rows], part.grid.bits, part.shape[1])
    zero = part.zero
    if zero is not None:
        flat = part.grid.zero == "int"
        zero = _flat_rows(zero, rows, part.scale.shape[1], part.grid.bits) if flat else zero[rows]
    return decode(codes, Scales(part.scale[rows], zero), part.grid)


def _flat_rows(packed: Tensor, rows: Tensor, width: int, bits: int) -> Tensor:
    """Rows [n] of a matrix [.., width] of codes that is packed flat: uint8 [n, width].

    A row begins anywhere, but eight codes at a byte: fetch the octets around each row.
    """
    begin = rows * width
    octets = (width + 14) // 8  # enough from any of eight beginnings
    places = (begin // 8 * bits)[:, None] + torch.arange(octets * bits, device=rows.device)
    # beyond the end lie no codes that are asked for
    codes = unpack(packed[places.clamp(max=len(packed) - 1)], bits, octets * 8)
    return codes.gather(1, (begin % 8)[:, None] + torch.arange(width, device=rows.device))


def _int4_rows(kernel: Int4, rows: Tensor) -> Tensor:
    """Rows of w = (code - 8) * scale + shift from ATen's blocks of rows, column after column."""
    order, (out, columns) = layout(), kernel.shape
    assert order is not None
    codes = torch.empty(len(rows), columns)
    whole = out // order.block * order.block
    for start, stop, block in ((0, whole, order.block), (whole, out, out - whole)):
        at = ((rows >= start) & (rows < stop)).nonzero()[:, 0]
        if len(at):
            number, inside = (rows[at] - start) // block, (rows[at] - start) % block
            byte, high = inside // 2, inside % 2
            if order.halves and block == order.block:
                byte, high = inside % (block // 2), inside // (block // 2)
            tiles = kernel.packed[start:stop].flatten().view(-1, columns, block // 2)
            codes[at] = (tiles[number, :, byte] >> (4 * high)[:, None] & 15).float()
    scale, shift = kernel.affine[:, rows].float().transpose(0, 1)[..., None].unbind(2)
    groups = codes.view(len(rows), scale.shape[1], -1)
    return ((groups - 8) * scale + shift).flatten(1)
