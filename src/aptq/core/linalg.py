"""Factor an input Hessian for the column sweep, climbing a ladder of rescues when it is singular.

With J the reversal of rows, J H J = L L^T gives U = J L^-1 J, upper, with H^-1 = U^T U: one
Cholesky and one triangular inverse, and the ill-conditioned inverse itself is never formed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAF = 128  # triangular inverses up to this size go to LAPACK directly
DEVICE_LEAF = 512  # and on a GPU, where launches cost more than their work
BATCH_BYTES = 256 << 20  # of matrices that are factored at once; three copies come on top
# up to these sizes a batch is faster than one after another (docs/log.md): a large matrix fills a
# GPU, and a CPU inverts it by halves faster than by a batch of triangular solves
BATCHED, DEVICE_BATCHED = 128, 2048


class Factor(NamedTuple):
    """inner [in, in]: upper U with H^-1 = U^T U, H damped and in the sweep's column order."""

    inner: Tensor


class Damping(NamedTuple):
    """What it took to factor H: to be counted in the report.

    damp: share of the mean live diagonal that was added; floor: further share of the largest
    diagonal; fallbacks: rungs climbed beyond the first try; dead: inputs never seen (diagonal 0);
    rung: "cholesky", "damped", "floor", "float64", or why there is no factor: "not finite",
    "not positive".
    """

    damp: float
    floor: float
    fallbacks: int
    dead: int
    rung: str


def dead_columns(hessian: Tensor) -> Tensor:
    """BoolTensor [in]: inputs that were always 0 in the calibration data (diagonal <= 0)."""
    return hessian.diagonal() <= 0


def damped_factor(
    hessian: Tensor, damp: float = 0.01, *, order: Tensor | None = None
) -> tuple[Factor | None, Damping]:
    """Factor H [in, in] float32 plus damping; H is not changed.

    damp: share of the mean diagonal of the live columns added to the diagonal, doubled up to 1 on
    failure; then 1 with a floor of 1e-6 ... 1 of the largest diagonal; then the same in float64 on
    the CPU.
    Dead columns (diagonal <= 0) are cut off from the others and get the mean diagonal.
    order: LongTensor [in], the sweep's column order, applied to H first.
    None as factor: not finite, or no rung was enough; the caller rounds to nearest.
    float32 is tried first: with damping of 1e-2 the condition number is below 100 * in, far from
    1e7, so float64 matters only where float32 fails.
    """
    assert hessian.dim() == 2, hessian.shape
    assert hessian.shape[0] == hessian.shape[1], hessian.shape
    assert damp >= 0, damp
    if not _finite(hessian):
        return None, Damping(damp, 0.0, 1, 0, "not finite")
    H, mean, dead = _prepared(hessian, order)
    peak = float(H.diagonal().max())
    fallbacks = 0
    for dtype in (torch.float32, torch.float64):
        # float64 on the CPU: it is rare, and takes twice the memory and ages on many GPUs
        place = H.device if dtype == torch.float32 else torch.device("cpu")
        for share, floor in _ladder(damp):
            inner = _inverse_factor(H.to(place, dtype, copy=True), share * mean + floor * peak)
            if inner is not None:
                rung = "float64" if dtype == torch.float64 else "floor" if floor else "damped"
                rung = rung if fallbacks else "cholesky"
                inner = inner.float().to(H.device)
                return Factor(inner), Damping(share, floor, fallbacks, dead, rung)
            fallbacks += 1
    return None, Damping(damp, 0.0, fallbacks, dead, "not positive")


def batch_count(size: int, device: torch.device) -> int:
    """How many matrices [size, size] are factored at once; 1 where one by one is no slower."""
    limit = DEVICE_BATCHED if device.type == "cuda" else BATCHED
    return max(1, BATCH_BYTES // (4 * size * size)) if size <= limit else 1


def damped_factors(
    hessians: Sequence[Tensor] | Tensor,
    damp: float = 0.01,
    orders: Sequence[Tensor] | Tensor | None = None,
) -> list[tuple[Factor | None, Damping]]:
    """`damped_factor` of every H [n, n] of hessians [k, n, n], many at once where that is faster.

    orders: LongTensor [k, n], the column order of each.  Matrices for which the first rung is not
    enough climb the ladder one by one.
    """
    found: list[tuple[Factor | None, Damping]] = []
    room = batch_count(len(hessians[0]), hessians[0].device) if len(hessians) else 1
    for start in range(0, len(hessians), room):
        some = hessians[start : start + room]
        ways = None if orders is None else orders[start : start + room]
        tried = _first_rung(some, damp, ways) if len(some) > 1 else [None]
        for number, held in enumerate(tried):
            order = None if ways is None else ways[number]
            found.append(held or damped_factor(some[number], damp, order=order))
    return found


def _first_rung(
    hessians: Sequence[Tensor] | Tensor, damp: float, orders: Sequence[Tensor] | Tensor | None
) -> list[tuple[Factor, Damping] | None]:
    """Factors of hessians [k, n, n] damped once, None where that is not enough.

    The host waits for the device once; each factor has memory of its own.
    """
    H, finite, dead = _damped_once(hessians, damp)
    if orders is None:
        H = H.flip(1, 2)
    else:
        back = torch.stack(list(orders)).flip(1)
        H = H[torch.arange(len(H), device=H.device)[:, None, None], back[:, :, None], back[:, None]]
    H, info = torch.linalg.cholesky_ex(H)
    eye = torch.eye(H.shape[1], device=H.device)
    H = torch.linalg.solve_triangular(H, eye, upper=False)
    good = finite & (info == 0) & H.sum((1, 2)).isfinite()
    good &= H.diagonal(dim1=1, dim2=2).amin(1) > 0
    return [
        (Factor(inner.flip(0, 1).contiguous()), Damping(damp, 0.0, 0, count, "cholesky"))
        if usable
        else None
        for inner, (usable, count) in zip(H, torch.stack([good, dead], 1).tolist(), strict=True)
    ]


def _damped_once(hessians: Sequence[Tensor] | Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `_prepared` makes of hessians [k, n, n], damped, 0 for those that are not finite; which
    are finite, bool [k]; dead columns of each, int64 [k].
    """
    H = (hessians if isinstance(hessians, Tensor) else torch.stack(list(hessians))).float()
    finite = H.sum((1, 2)).isfinite()
    H = (H + H.mT).mul_(0.5).masked_fill_(~finite[:, None, None], 0.0)
    diagonal = H.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    live = (~dead).sum(1)
    mean = diagonal.double().masked_fill(dead, 0.0).sum(1) / live
    mean = mean.where(live > 0, 1.0)
    H.masked_fill_(dead[:, :, None], 0.0).masked_fill_(dead[:, None, :], 0.0)
    diagonal.add_((damp + dead.double()) * mean[:, None])
    return H, finite, dead.sum(1)


def _prepared(hessian: Tensor, order: Tensor | None) -> tuple[Tensor, float, int]:
    """Symmetric, ordered float32 copy with dead columns cut off; mean live diagonal; dead count."""
    H = hessian.float()
    H = (H + H.T).mul_(0.5)
    dead = dead_columns(H)
    count = int(dead.sum())
    live = len(H) - count
    mean = float(H.diagonal()[~dead].double().mean()) if live else 1.0
    if count:
        H[dead] = 0.0
        H[:, dead] = 0.0
        H.diagonal()[dead] = mean
    if order is not None:
        H = H[order][:, order]
    return H, mean, count


def _ladder(damp: float) -> list[tuple[float, float]]:
    """(share of the mean, share of the peak) to add, one after the other."""
    shares = [damp]
    step = damp or 1e-4
    while shares[-1] < 1:
        shares.append(min(1.0, 2 * shares[-1] or step))
    return [(share, 0.0) for share in shares] + [(1.0, 10.0**power) for power in range(-6, 1)]


def _inverse_factor(H: Tensor, added: float) -> Tensor | None:
    """Upper U with (H + added I)^-1 = U^T U, or None; overwrites H."""
    H.diagonal().add_(added)
    lower, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info) != 0:
        return None
    inner = _triangular_inverse(lower).flip(0, 1)
    usable = _finite(inner.float()) and float(inner.diagonal().min()) > 0
    return inner.contiguous() if usable else None


def _finite(matrix: Tensor) -> bool:
    """True if no element is infinite or NaN: one sum, where isfinite writes a matrix first."""
    return bool(matrix.sum().isfinite())


def _triangular_inverse(lower: Tensor) -> Tensor:
    """Inverse of lower [n, n] by halves: matrix products run faster than one triangular solve."""
    inverse = torch.zeros_like(lower)
    _invert_into(inverse, lower)
    return inverse


def _invert_into(inverse: Tensor, lower: Tensor) -> None:
    size = len(lower)
    if size <= (DEVICE_LEAF if lower.is_cuda else LEAF):
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    _invert_into(inverse[:half, :half], lower[:half, :half])
    _invert_into(inverse[half:, half:], lower[half:, half:])
    corner = inverse[half:, half:] @ lower[half:, :half] @ inverse[:half, :half]
    inverse[half:, :half] = corner.neg_()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of float32 [n, k] and [k, m]; on a GPU in its matrix units, with errors of 2^-15.

    For sums that are looked at, not for error feedback: the relative error is of |a| |b|.
    """
    if not a.is_cuda or a.dtype != torch.float32:
        return a @ b
    return torch.mm(*split(a, b), out_dtype=torch.float32)


def split(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [n, 3 k] and [3 k, m] whose product is a @ b without that of both remainders."""
    (a, least_a), (b, least_b) = _halves(a), _halves(b)
    return torch.cat([a, a, least_a], 1), torch.cat([b, least_b, b])


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 that add up to x within 2^-17 of it."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()
