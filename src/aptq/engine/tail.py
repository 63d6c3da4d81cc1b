"""What a model does behind its blocks (final norm, head, soft-cap, scaling), by its own code.

The logits of all tokens of a large vocabulary do not fit in memory: they are made in pieces.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aptq.model.model import Model

PIECE = 256 << 20  # bytes of logits, their float32 forms and gradients at a time
PER_LOGIT = 24  # bytes: logit and gradient in 16 bit and float32, float64 sums for sampling


def pieces(
    shape: tuple[int, int], vocabulary: int, room: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """Cut [windows, length] tokens so that one piece's logits stay small; (windows, tokens).

    room: bytes that they and what is made of them may take; None = PIECE.
    """
    limit = max(1, (room or PIECE) // (PER_LOGIT * vocabulary))
    count, length = shape
    rows, step = max(1, limit // length), min(length, limit)
    for start in range(0, count, rows):
        for token in range(0, length, step):
            yield slice(start, min(start + rows, count)), slice(token, min(token + step, length))


def logits(model: Model, hidden: Tensor, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of the last block's output [batch, length, width].

    `ids` [batch, length] are only embedded, for the model's code starts there; nothing else mixes
    positions.  The outer weights must be loaded (Model.load_outer).
    """
    held = hidden.clone()  # the model may write into what a block returns
    blocks = model.skeleton.get_submodule(model.arch.blocks).children()
    with replaced(blocks, lambda *_args, **_kwargs: held):
        output: Tensor = model.skeleton(input_ids=ids, use_cache=False).logits
    return output


@contextmanager
def replaced(modules: Iterable[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Modules that run `forward` instead of their own code while it is open."""
    held = list(modules)
    for module in held:
        module.forward = forward
    try:
        yield
    finally:
        for module in held:
            del module.__dict__["forward"]


def sample(logits: Tensor, chance: Tensor) -> Tensor:
    """Labels int64 [...] drawn from softmax(logits) [..., vocabulary] by uniform `chance` [...].

    By the inverse of the distribution function, so that a label depends on its own token only and
    not on how tokens were cut into pieces.
    """
    below = logits.float().softmax(-1).double().cumsum(-1)
    at = chance.to(below)[..., None] * below[..., -1:]
    found = torch.searchsorted(below, at, right=True).squeeze(-1)
    return found.clamp(max=logits.shape[-1] - 1)
