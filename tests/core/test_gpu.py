"""The same numbers on a GPU as on the CPU, and every result on the device of its inputs."""

import pytest
import torch
from torch import Tensor

from aptq.core.bits import pack, unpack
from aptq.core.grid import Grid
from aptq.core.linalg import damped_factor
from aptq.core.parts import part_of
from aptq.core.rounding import Scales, fit, snap
from aptq.core.sweep import GridRule, sweep

pytestmark = pytest.mark.gpu
TEXTS = ["int3-row-z", "int4-g16", "int4-g20-z-bf16", "int5-g16-fz", "bf16"]


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 77), dtype=torch.uint8)
    packed = pack(codes.cuda(), bits)
    assert packed.is_cuda
    assert torch.equal(packed.cpu(), pack(codes, bits))
    assert torch.equal(unpack(packed, bits, 77).cpu(), codes)


def problem() -> tuple[Tensor, Tensor]:
    """Weight [40, 150] and Hessian [150, 150] on the GPU."""
    x = torch.randn(400, 150) @ torch.randn(150, 150)
    return torch.randn(40, 150).cuda(), (x.T @ x / 400).cuda()


@pytest.mark.parametrize("text", TEXTS)
def test_fit_and_snap(text: str) -> None:
    grid = Grid.parse(text)
    weight, H = problem()
    scales = fit(weight, grid, importance=H.diagonal(), shrink=(1.0, 0.9, 0.8))
    same = fit(weight.cpu(), grid, importance=H.diagonal().cpu(), shrink=(1.0, 0.9, 0.8))
    assert scales.scale.is_cuda
    # A tie between two factors may be broken differently.
    assert scales.scale.cpu().eq(same.scale).float().mean() > 0.99 or grid.dense
    here = Scales(scales.scale.cpu(), None if scales.zero is None else scales.zero.cpu())
    assert torch.equal(snap(weight, scales, grid).cpu(), snap(weight.cpu(), here, grid))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_sweep_and_parts(text: str, given: bool) -> None:
    grid = Grid.parse(text)
    weight, H = problem()
    order, segments = H.diagonal().argsort(descending=True), None
    if not given:
        order = torch.arange(150, device=H.device)
        segments = grid.group_of(150).bincount().tolist()
    factor, _ = damped_factor(H, order=order)
    assert factor is not None
    rule = GridRule(grid, (40, 150), fit(weight, grid) if given else None)
    swept = sweep(weight, factor.inner, rule, order=order, segments=segments)
    error = (swept.rounded - weight).double()
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(150).cuda()
    assert swept.loss == pytest.approx(float(((error @ damped) * error).sum()), rel=1e-3)
    part = part_of(swept.rounded, rule.scales(), grid)
    assert all(tensor.is_cuda for tensor in part.tensors().values())
    assert torch.equal(part.dense(), swept.rounded)
    assert torch.equal(part.rows(3, 17), swept.rounded[3:17])
