"""Coordinate descent on codes: refine what any quantizer left, never raising tr(E H E^T).

W, Q [out, in], E = Q - W, H [in, in].  Cyclic: QuantEase (arXiv:2309.01885); greedy: CDQuant
(arXiv:2406.17542), which is the best rule of block coordinate descent (arXiv:1712.08859) for
blocks of one code.  The scales of a row are one more block, solved for jointly.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.grid import Grid
from aptq.core.moves import Rows, climb, climb_singly, cycle, pair_moves
from aptq.core.rounding import Scales, code_offset

Mode = Literal["cyclic", "greedy"]
STALL = 1e-4  # what lowers the loss by less than this share of it is the last of its kind
TILE = 1 << 24  # numbers in the systems that are solved at once


class Descended(NamedTuple):
    """codes uint8 [out, in]; their scales; loss of each row before and after, [out]."""

    codes: Tensor
    scales: Scales
    start: Tensor
    loss: Tensor


class Quadratic(NamedTuple):
    """What is minimised: weight and H of one dtype, [out, in] and [in, in], Q on grid."""

    weight: Tensor
    H: Tensor
    grid: Grid

    def each(self, scales: Tensor) -> Tensor:
        """Scales or zeros [out, groups] for each entry, [out, in]."""
        owner = self.grid.group_of(len(self.H)).to(scales.device)
        return scales.to(self.H.dtype)[:, owner]

    def levels(self, codes: Tensor, scales: Scales) -> Tensor:
        """Float codes [out, in] without their zero: entries in units of their scale."""
        zero = None if scales.zero is None else self.each(scales.zero)
        return codes - code_offset(zero, self.grid)

    def error(self, codes: Tensor, scales: Scales) -> Tensor:
        """E = Q - W, [out, in]."""
        return self.levels(codes, scales).mul_(self.each(scales.scale)).sub_(self.weight)

    def loss(self, codes: Tensor, scales: Scales) -> Tensor:
        """(E H E^T)_ii, [out]."""
        error = self.error(codes, scales)
        return ((error @ self.H) * error).sum(1)

    def rows(self, codes: Tensor, scales: Scales) -> Rows:
        """All rows, with the residual made afresh."""
        return Rows(codes, self.error(codes, scales) @ self.H, self.each(scales.scale))


def descend(
    problem: Quadratic,
    codes: Tensor,
    scales: Scales,
    *,
    mode: Mode = "greedy",
    pairs: bool = False,
    sweeps: int = 20,
    rounds: int = 3,
) -> Descended:
    """Better codes uint8 [out, in] and scales (in their stored dtype) than those given.

    Sweeps over the codes, then at most `rounds` times scales and sweeps; pairs: at the end moves
    of two codes at once.  Columns with H_jj = 0 are left alone.  Products must be exact float32
    products, not TF32.
    """
    held, found = codes.to(problem.H.dtype), scales
    start = least = problem.loss(held, found)
    top = problem.grid.levels - 1
    for number in range(rounds + 1):
        enough = STALL * float(least.sum())
        tried = refit(problem, held, found, least) if number else found
        moved = improve(problem, held.clone(), tried, mode, sweeps, enough)
        loss = problem.loss(moved, tried)
        better = (loss < least)[:, None]  # rounding errors shall not raise a loss either
        held = torch.where(better, moved, held)
        found = Scales(torch.where(better, tried.scale, found.scale), found.zero)
        gained, least = float((least - loss).sum()), torch.minimum(loss, least)
        if number and gained <= enough:
            break
    if pairs and len(problem.H) > 1:
        moved = held.clone()
        climb(problem.rows(moved, found), problem.H, pair_moves(problem.H, top))
        loss = problem.loss(moved, found)
        held = torch.where((loss < least)[:, None], moved, held)
        least = torch.minimum(loss, least)
    return Descended(held.to(torch.uint8), found, start, least)


def improve(
    problem: Quadratic,
    codes: Tensor,
    scales: Scales,
    mode: Mode,
    sweeps: int,
    enough: float = 0.0,
) -> Tensor:
    """Float codes [out, in], overwritten, after sweeps until one gains no more than `enough`."""
    H, top = problem.H, problem.grid.levels - 1
    for _ in range(sweeps):
        rows, greedy = problem.rows(codes, scales), mode == "greedy"
        gain = climb_singly(rows, H, top) if greedy else cycle(rows, H, top)
        if float(gain.sum()) <= enough:
            break
    return codes


def refit(problem: Quadratic, codes: Tensor, scales: Scales, loss: Tensor) -> Scales:
    """The best scales for float codes [out, in], as stored, in rows whose loss [out] they lower."""
    old = scales.scale
    steps = scale_steps(problem, codes, scales)
    new = (old.to(steps.dtype) + steps).to(old.dtype)
    new = torch.where((new.sign() == old.sign()) & new.isfinite(), new, old)
    lower = problem.loss(codes, scales._replace(scale=new)) < loss
    return scales._replace(scale=torch.where(lower[:, None], new, old))


def scale_steps(problem: Quadratic, codes: Tensor, scales: Scales) -> Tensor:
    """Changes of the scales [out, groups] that lead to the minimum, all groups jointly.

    With C [in, groups] the levels of a row, each in its group: (C^T H C) ds = -C^T r.
    """
    H, columns = problem.H, len(problem.H)
    levels, R = problem.levels(codes, scales), problem.error(codes, scales) @ H
    count, size = problem.grid.groups(columns), problem.grid.group or columns

    def grouped(values: Tensor) -> Tensor:  # sums over the columns of each group
        padded = F.pad(values, (0, count * size - columns))
        return padded.view(-1, count, size).sum(2)

    found = []
    tile = max(1, TILE // max(count * count, columns))
    for L, r in zip(torch.split(levels, tile), torch.split(R, tile), strict=True):
        groups = zip(torch.split(L, size, 1), torch.split(H, size), strict=True)
        A = torch.stack([grouped((part @ band) * L) for part, band in groups], 1)
        diagonal = A.diagonal(dim1=1, dim2=2)
        empty = diagonal <= 0
        diagonal.add_(diagonal * 16 * torch.finfo(A.dtype).eps).add_(empty)
        lower, info = torch.linalg.cholesky_ex(A)
        steps = torch.cholesky_solve(grouped(r * L)[:, :, None], lower).squeeze(2).neg_()
        found.append(steps.masked_fill_(empty | (info != 0)[:, None], 0))
    return torch.cat(found)
