"""AffineQuant, foldable: a matrix between v and o, scales elsewhere (arXiv:2403.12544).

Every KV head gets A [head_dim, head_dim]: W_v' = A^-T W_v and W_o' = W_o A^T of its query heads,
both stored folded.  The paper's matrices behind norms do not fold and stay out: they would cost
two products of the width squared for each token, and floats that no byte budget holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aptq.core.transform import bounded
from aptq.engine.clip import Transform
from aptq.engine.fold import Pair
from aptq.engine.stage import methods
from aptq.stats.reach import Folding

# what the other entries of a row may add up to, as a share of its diagonal: rows that are strictly
# dominant make a matrix that can be inverted (Levy-Desplanques; the paper keeps it by a small
# `stability` alone)
DOMINANT = 0.9


@methods.register("affinequant")
@dataclass(frozen=True, kw_only=True)
class AffineQuant(Folding):
    """OmniQuant's ranges and scales; between v and o bands beside the diagonal open one by one."""

    epochs: int = 20  # stages of the mask; the paper's epochs
    # weight of what is beside the diagonal; the authors' where v -> o has the only matrices (LLaMA
    # W4A4).  Their 1e-2 for LLaMA at 2 to 4 bits gains nothing here, 1 no more than 0.1
    stability: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError for no epochs and a stability below 0."""
        super().__post_init__()
        if self.epochs < 1 or self.stability < 0:
            raise ValueError(
                f"affinequant: an option is out of range\nepochs = {self.epochs} >= 1, "
                f"stability = {self.stability} >= 0\ncorrect it in the recipe"
            )

    def made(self, pair: Pair, scale: Tensor, shift: Tensor | None) -> Transform:
        """Matrices for v -> o, scales for the rest."""
        if pair.kind != "v-o":
            return super().made(pair, scale, shift)
        start = scale.view(pair.heads, -1).diag_embed()
        return Affine(pair, start, self.scales, self.stability, self.steps, self.epochs)


class Affine(Transform):
    """A = parameter * mask [heads, d, d], strictly diagonally dominant after every step."""

    def __init__(
        self, pair: Pair, start: Tensor, rate: float, stability: float, steps: int, epochs: int
    ) -> None:
        """start: diagonal float32 [heads, d, d]; the mask opens over `steps` in `epochs`."""
        super().__init__(pair, start, None, rate)
        size = start.shape[-1]
        masks = [gradual(size, epoch, epochs, stability) for epoch in range(epochs)]
        self.masks, self.steps, self.taken = torch.stack(masks).to(start.device), steps, 0
        self.mask: Tensor
        self.register_buffer("mask", self.masks[0].clone())

    def factor(self) -> Tensor:
        """A."""
        return self.scale * self.mask

    @torch.no_grad()
    def stepped(self) -> None:
        """Open the mask as far as the steps say; then make A dominant."""
        self.taken += 1
        epoch = min(self.taken * len(self.masks) // max(self.steps, 1), len(self.masks) - 1)
        self.mask.copy_(self.masks[epoch])
        self.scale.copy_(dominant(self.scale, self.mask))


def gradual(size: int, epoch: int, epochs: int, off: float) -> Tensor:
    """Mask [size, size] of an epoch: 1 on the diagonal, `off` in bands that grow to all of it.

    |i - j| < floor((size - 1) epoch / (epochs - 1)) + 1 is open (the paper's code); a single epoch
    has everything open.
    """
    far = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    bands = (size - 1) * epoch // (epochs - 1) + 1 if epochs > 1 else size
    return torch.where(far == 0, 1.0, torch.where(far < bands, off, 0.0))


def dominance(matrix: Tensor) -> Tensor:
    """|a_ii| - sum_{j != i} |a_ij| of every row: [..., d] of [..., d, d]."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs()
    return 2 * diagonal - matrix.abs().sum(-1)


def dominant(matrix: Tensor, mask: Tensor) -> Tensor:
    """A matrix [..., d, d] changed as little as makes `matrix * mask` strictly dominant.

    Only diagonals are kept away from 0 (the paper's code bounds all entries); the others of a row
    are scaled down together.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    others = matrix - diagonal.diag_embed()
    kept = bounded(diagonal)
    total = (others * mask).abs().sum(-1).clamp(min=torch.finfo(matrix.dtype).tiny)
    share = (DOMINANT * kept.abs() / total).clamp(max=1)
    return kept.diag_embed() + others * share.unsqueeze(-1)
