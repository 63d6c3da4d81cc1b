"""Super-block types as grids: one more kind of grid for everything that asks a grid."""

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.kbytes import packed
from aptq.core.kquants import KQUANTS, SUPER, recovered
from aptq.core.linalg import damped_factor
from aptq.core.parts import Quantized, nearest_part, part_of, part_specs
from aptq.core.plan import PartSpec, Plan, Target
from aptq.core.rounding import decode, encode, fit, snap
from aptq.core.stack import StackRule
from aptq.core.sweep import GridRule, sweep
from aptq.kernels.reference import Reference
from aptq.runtime.embedding import kernel_rows

gguf = pytest.importorskip("gguf")
GRIDS = [Grid(name) for name in ("iq4_nl", *KQUANTS)]


def raw(part: Quantized) -> Tensor:
    """The bytes of a GGUF tensor, uint8 [out, ...]."""
    scale, zero = part.scales()
    if part.grid.kind is None:
        low, high = part.unpacked().view(len(scale), -1, 2, 16).unbind(2)
        return torch.cat([scale[..., None].view(torch.uint8), low | high << 4], -1).flatten(1)
    low = torch.zeros_like(scale) if zero is None else zero * scale
    return packed(part.unpacked(), recovered(scale, low, part.grid.kind), part.grid.kind)


def weights(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, 2 * SUPER, generator=generator) * 0.05


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_text_and_size(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid
    assert grid.fits(512)
    assert grid.fits(576) == (grid.kind is None)
    assert not grid.fits(40)
    type_ = gguf.GGMLQuantizationType[str(grid).upper()]
    block, nbytes = gguf.GGML_QUANT_SIZES[type_]
    assert grid.nbytes((24, 512)) == 24 * 512 // block * nbytes
    part = nearest_part(weights(), grid)
    assert part.nbytes == grid.nbytes((24, 512))
    found = {name: (t.dtype, tuple(t.shape)) for name, t in part.tensors().items()}
    assert found == part_specs(PartSpec(grid), (24, 512))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_part_is_what_ggml_reads(grid: Grid) -> None:
    W = weights()
    part = nearest_part(W, grid)
    assert isinstance(part, Quantized)
    data = raw(part)
    type_ = gguf.GGMLQuantizationType[str(grid).upper()]
    theirs = torch.from_numpy(gguf.quants.dequantize(data.numpy(), type_))
    torch.testing.assert_close(part.dense(), theirs, rtol=1e-5, atol=1e-7)
    again = Quantized.load(part.tensors(), part.meta(), part.shape)
    assert torch.equal(again.dense(), part.dense())
    assert torch.equal(part.rows(3, 9), part.dense()[3:9])
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(kernel_rows(Reference(part), rows), part.dense()[rows])
    scales = fit(W, grid)
    assert torch.equal(encode(decode(part.unpacked(), scales, grid), scales, grid), part.unpacked())
    assert torch.equal(snap(W, scales, grid), decode(encode(W, scales, grid), scales, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_errors_are_fed_back(grid: Grid) -> None:
    W = weights()
    X = torch.randn(2000, 512, generator=torch.Generator().manual_seed(1))
    X = X @ torch.randn(512, 512, generator=torch.Generator().manual_seed(2)) / 16
    H = X.T @ X / len(X)
    factor = damped_factor(H, 0.01)[0]
    assert factor is not None
    importance = H.diagonal()
    scales = fit(W, grid, importance=importance)
    swept = sweep(W, factor.inner, GridRule(grid, (24, 512), scales))
    part = part_of(swept.rounded, scales, grid)
    torch.testing.assert_close(part.dense(), swept.rounded, rtol=1e-4, atol=1e-6)

    def loss(Q: Tensor) -> Tensor:
        return (((Q - W) @ H) * (Q - W)).sum()

    assert loss(part.dense()) < 0.8 * loss(snap(W, scales, grid))


def test_a_plan_knows_the_widths() -> None:
    grid = Grid("q4_k")
    plan = Plan({"a": Target((PartSpec(grid),)), "b": Target((PartSpec(grid),))})
    plan.check({"a": (8, 256), "b": (8, 512)})
    with pytest.raises(ValueError, match="576 columns are no multiple of 256"):
        plan.check({"a": (8, 256), "b": (8, 576)})


def test_all_types_are_swept_together() -> None:
    """Stacked candidates come out as each by itself."""
    W, grids = weights(), [*GRIDS, Grid("int4", 32), Grid("int3", 64, "float")]
    U = torch.linalg.qr(torch.randn(512, 512, generator=torch.Generator().manual_seed(1)))[1]
    U = U * U.diagonal().sign()[:, None] / 20
    scales = [fit(W, grid) for grid in grids]
    together = sweep(W.repeat(len(grids), 1), U, StackRule(grids, scales, 512)).rounded
    for grid, held, got in zip(grids, scales, together.split(len(W)), strict=True):
        alone = sweep(W, U, GridRule(grid, (24, 512), held)).rounded
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-6)
