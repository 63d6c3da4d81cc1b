"""Moves of single codes, or of two, that lower tr(E H E^T), E = Q - W [rows, in], H [in, in].

With R = E H, moving the code of entry ij by m steps s changes the loss by 2 m s R_ij +
m^2 s^2 H_jj, least at m = -R_ij / (H_jj s); over whole m this is rounded: exact, and in units of
codes alike for every kind of zero.  The rows do not influence each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aptq.core.limits import kernels_for

EPS = 1e-6  # gains below this share of H_jj s^2 are rounding noise
PANEL = 128  # columns between two matrix products
BURST = 32  # moves of a row between two looks at which rows are finished
PARTNERS = 8  # columns that a pair move tries with each column
TILE = 1 << 24  # entries whose moves are weighed at once
WIDEST = 1 << 14  # columns that a kernel holds in the registers of one program


class Rows(NamedTuple):
    """Rows on their way: all [rows, in], float32 or (to check) float64; changed in place."""

    codes: Tensor  # 0 .. levels - 1
    residual: Tensor  # (Q - W) H
    step: Tensor  # the scale of each entry


Moves = tuple[Tensor, Tensor, Tensor]  # gain [rows], columns [rows, n], code steps [rows, n]


def cycle(rows: Rows, H: Tensor, top: int, *, panel: int = PANEL) -> Tensor:
    """One sweep over the columns, all rows at once; the gain of each row, [rows].

    Inside a panel a column first takes up the moves of its panel so far; the residual of all
    columns follows in one product at its end.
    """
    columns = len(H)
    codes, R = rows.codes.T.contiguous(), rows.residual.T.contiguous()
    gain = R.new_zeros(R.shape[1])
    for start in range(0, columns, panel):
        part = slice(start, min(start + panel, columns))
        near, size = H[part, part].contiguous(), part.stop - part.start
        step = rows.step[:, part].T.contiguous()
        toward = _toward(near.diagonal()[:, None], step)
        local, moved = R[part].clone(), torch.empty_like(step)
        for j in range(size):
            column, now = local[j], codes[start + j]
            if j:
                column.addmv_(moved[:j].T, near[j, :j])
            new = (column * toward[j]).round_().add_(now).clamp_(0, top)
            torch.sub(new, now, out=moved[j]).mul_(step[j])
            now.copy_(new)
        before = R[part].clone()
        R.addmm_(H[:, part], moved)
        gain -= (moved * before.add_(R[part])).sum(0)  # dL = tr(D (R + R') ^T), R' = R + D H
    rows.codes.copy_(codes.T)
    rows.residual.copy_(R.T)
    return gain


def climb_singly(rows: Rows, H: Tensor, top: int) -> Tensor:
    """`climb` by moves of one code: on a GPU in one launch."""
    if not kernels_for(H) or not 1 < len(H) <= WIDEST:
        return climb(rows, H, single_moves(H, top))
    from aptq.core import fused

    held = (rows.codes, rows.residual, rows.step)
    return fused.climb(*held, H.contiguous(), _toward(H.diagonal(), 1.0), top)


def climb(rows: Rows, H: Tensor, propose: Callable[[Rows], Moves]) -> Tensor:
    """Each row makes its best move until it has none; the gain of each row, [rows].

    At most as many moves as columns: a caller that wants more makes a new residual first.
    """
    total = rows.residual.new_zeros(len(rows.codes))
    everyone = torch.arange(len(total), device=total.device)
    for ids in torch.split(everyone, max(1, TILE // len(H))):
        for _ in range(0, len(H), BURST):
            some = Rows(*(tensor[ids] for tensor in rows))
            for _ in range(BURST):
                gain, at, moves = propose(some)
                delta = moves * some.step.gather(1, at)
                some.codes.scatter_add_(1, at, moves)
                for k in range(at.shape[1]):
                    some.residual.addcmul_(H[at[:, k]], delta[:, k : k + 1])
                total[ids] += gain
            rows.codes[ids], rows.residual[ids] = some.codes, some.residual
            ids = ids[gain > 0]
            if not len(ids):
                break
    return total


def single_moves(H: Tensor, top: int) -> Callable[[Rows], Moves]:
    """Proposes for each row the one code whose best move gains most."""
    diagonal = H.diagonal()

    def propose(rows: Rows) -> Moves:
        toward = _toward(diagonal, rows.step).mul_(rows.residual)
        moves = toward.round().add_(rows.codes).clamp_(0, top).sub_(rows.codes)
        # 2 m toward - m^2 in units of H s^2; `toward` is a little short, so a move always gains
        gains = toward.mul_(2).sub_(moves).mul_(moves).mul_(diagonal * rows.step.square())
        gain, at = gains.max(1, keepdim=True)
        return gain.squeeze(1), at, moves.gather(1, at)

    return propose


def pair_moves(H: Tensor, top: int) -> Callable[[Rows], Moves]:
    """Proposes for each row one code step, or two on columns that make up for each other.

    Where no single step gains, two can only if -2 a b s_i s_k H_ik > 0: this fixes b's sign.
    """
    diagonal = H.diagonal()
    root = diagonal.clamp(min=torch.finfo(H.dtype).tiny).sqrt()
    close = (H / root).abs_().div_(root[:, None]).fill_diagonal_(-1)
    partners = close.topk(min(PARTNERS, len(H) - 1), dim=1).indices  # [in, partners]

    def propose(rows: Rows) -> Moves:
        codes, R, step = rows
        own = diagonal * step.square()
        up, down = -2 * step * R - own, 2 * step * R - own
        outside = torch.stack([codes < 1, codes >= top])
        alone = torch.stack([down, up]).masked_fill_(outside, -torch.inf)  # [2, rows, in]
        most, which = torch.zeros_like(alone), torch.full_like(alone, -1, dtype=torch.int8)
        for tried, other in enumerate(partners.T):
            cross = 2 * step * step[:, other] * H.gather(1, other[:, None])[:, 0]
            second = alone[:, :, other]
            value = torch.where(cross > 0, second.flip(0), second).add_(cross.abs())
            better = value > most
            most, which = torch.where(better, value, most), which.masked_fill_(better, tried)
        gain, best = (alone + most).transpose(0, 1).flatten(1).max(1)
        sign, first = best // len(H), best % len(H)
        row = torch.arange(len(best), device=best.device)
        number = which[sign, row, first].long()
        other = partners[first, number.clamp(min=0)]
        a = (2 * sign - 1).to(R.dtype)
        b = -a * (step[row, first] * step[row, other] * H[first, other]).sign() * (number >= 0)
        good = gain > EPS * own[row, first]
        moves = torch.stack([a, b], 1) * good[:, None]
        return torch.where(good, gain, 0), torch.stack([first, other], 1), moves

    return propose


def _toward(diagonal: Tensor, step: Tensor | float) -> Tensor:
    """What a residual is multiplied by to give the best move in codes, a little short.

    Short by EPS, so that a move that rounding makes of it always gains.  0 where H_jj = 0.
    """
    inverse = torch.where(diagonal > 0, (EPS - 1) / diagonal, 0)
    return inverse / step
