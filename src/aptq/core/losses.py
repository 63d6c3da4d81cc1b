"""What a reconstruction minimises: distances between a block's output and its target.

All take got and wanted [windows, length, width] and give a scalar in float32, a mean over tokens;
weight [length] (mean 1) counts the positions of a window, None counts them alike.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
TRIM = 1e-3  # share of the largest errors left out; what AutoRound drops below 4 bits


def mse(got: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    """Mean squared difference."""
    error = got.float() - wanted.float()
    return _mean(error.square().mean(-1), weight)


def relative(got: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    """Squared difference of a token as a share of its target's square: what a norm behind sees.

    A few tokens are hundreds of times larger than the others (attention sinks); in `mse` their
    errors are nearly all there is.
    """
    error = (got.float() - wanted.float()).square().mean(-1)
    return _mean(error / wanted.float().square().mean(-1).clamp(min=1e-12), weight)


def cosine(got: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    """Mean squared difference plus -log cos of the angle, a token at a time (arXiv:2403.12544 and
    LRQuant's log-cosine): tokens of large and of small states count alike in the second term.
    """
    close = F.cosine_similarity(got.float(), wanted.float(), dim=-1).clamp(min=1e-6)
    return mse(got, wanted, weight) + _mean(-close.log(), weight)


def channels(got: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    """Mean squared difference plus KL(softmax(wanted) || softmax(got)) over the width of a token
    (arXiv:2312.07950); where one channel is massive, the second term sees no other.
    """
    ours, theirs = got.float().log_softmax(-1), wanted.float().log_softmax(-1)
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return mse(got, wanted, weight) + _mean(kl, weight)


def distribution(got: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    """Differences of mean and variance of every channel over the tokens (arXiv:2309.02784, eq. 2).

    Statistics are taken a window at a time, as the paper's samples are; `weight` has no part.
    """
    ours, theirs = got.float(), wanted.float()
    mean = (ours.mean(1) - theirs.mean(1)).abs()
    variance = (ours.var(1, unbiased=False) - theirs.var(1, unbiased=False)).abs()
    return (mean + variance).mean()


def trimmed(got: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    """Mean squared difference without the largest thousandth of all differences."""
    error = (got.float() - wanted.float()).square()
    if weight is not None:
        error = error * weight[:, None]
    flat = error.flatten()
    drop = int(TRIM * flat.numel())
    if drop == 0:
        return flat.mean()
    cut = flat.detach().topk(drop, sorted=True).values[-1]
    return torch.where(flat < cut, flat, 0).sum() / (flat.numel() - drop)


def _mean(tokens: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of [windows, length] with the positions weighted."""
    return tokens.mean() if weight is None else (tokens * weight).mean()


LOSSES: Mapping[str, Loss] = {
    "mse": mse,
    "relative": relative,
    "cosine": cosine,
    "channels": channels,
    "distribution": distribution,
    "trimmed": trimmed,
}
