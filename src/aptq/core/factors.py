"""The best product of two factors for an error E [out, in], by what it does to the output.

With a root S of the metric, S S^T = H [in, in], the squared change of the output is |E S|^2, and
the truncated singular value decomposition of E S, taken back by the inverse of S, is the optimum
among all products of a rank (EoRA, arXiv:2410.21271; any root gives the same product).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aptq.core.parts import LowRank
from aptq.core.plan import PartSpec


class Root(NamedTuple):
    """S [in, k] with S S^T = H on the k directions that were seen, and inverse [k, in]."""

    root: Tensor
    inverse: Tensor


class Spectrum(NamedTuple):
    """E S = left diag(values) right S, values falling; left [out, k], right [k, in].

    The error of the best product of rank r is sum of values[r:]^2.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def metric_root(H: Tensor) -> Root:
    """Root of H float32 [in, in] by its eigenvectors in float64.

    Eigenvalues below max * in * 2^-23 are rounding of the sums and would only blow up the inverse.
    """
    values, vectors = torch.linalg.eigh(H.double())
    live = values > values[-1].clamp(min=0) * len(H) * torch.finfo(torch.float32).eps
    scale, vectors = values[live].sqrt(), vectors[:, live]
    return Root((vectors * scale).float(), (vectors / scale).T.float())


def identity_root(columns: int, device: torch.device) -> Root:
    """The root of the metric that counts all directions alike."""
    one = torch.eye(columns, device=device)
    return Root(one, one)


def spectrum(error: Tensor, root: Root) -> Spectrum:
    """Decompose an error [out, in] float32 in the metric of a root."""
    left, values, right = torch.linalg.svd(error @ root.root, full_matrices=False)
    return Spectrum(left, values, right @ root.inverse)


def best_part(error: Tensor, found: Spectrum, spec: PartSpec, H: Tensor | None) -> LowRank:
    """The product that stands for an error [out, in] best in the metric H (None: the identity).

    The root of the singular values goes into both factors, which keeps them of one size; when the
    right one has been rounded the left one is solved for again, which is never worse.
    """
    count = min(spec.rank, int((found.values > 0).sum()))
    scale = found.values[:count].sqrt()
    left, right = found.left[:, :count] * scale, scale[:, None] * found.right[:count]
    missing = spec.rank - count  # of an error of lower rank
    left = torch.nn.functional.pad(left, (0, missing))
    right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    stored = LowRank.make(left, right, spec).right.dense()
    weighted = (stored if H is None else stored @ H).double()
    gram = weighted @ stored.T.double()
    solved = error.double() @ weighted.T @ torch.linalg.pinv(gram, hermitian=True)
    return LowRank.make(solved.float(), stored, spec)
