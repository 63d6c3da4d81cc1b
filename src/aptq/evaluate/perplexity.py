"""Perplexity over non-overlapping windows: exp of the mean NLL of every predicted token.

A window of n tokens gives n - 1 predictions; nothing is carried from window to window.  The forward
pass runs in the model's dtype, the log-softmax in float32 over a few positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1 << 23  # float32 values in a block of logits: 32 MiB
Progress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclass(frozen=True)
class Perplexity:
    """NLL in nats of each window (mean of its `window - 1` predictions) and how it was taken.

    `bos` is the id put before each window, or None; `binned` the mean NLLs of each window in the
    bins of `position_bins`.  The sum of two is that of the windows of both.
    """

    nlls: tuple[float, ...]
    window: int
    bos: int | None = None
    binned: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, tokens: Sequence[Tensor], window: int, bos: int | None) -> Self:
        """From the NLLs of every token, float64 [window - 1] a window."""
        nlls = tuple(values.mean().item() for values in tokens)
        return cls(nlls, window, bos, tuple(map(by_position, tokens)))

    def __add__(self, more: Self) -> Self:
        assert (self.window, self.bos) == (more.window, more.bos), (self.window, more.window)
        return replace(self, nlls=self.nlls + more.nlls, binned=self.binned + more.binned)

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.nlls)

    @property
    def tokens(self) -> int:
        """Number of predictions."""
        return self.windows * (self.window - 1)

    @property
    def nll(self) -> float:
        """Mean NLL of a prediction in nats."""
        return math.fsum(self.nlls) / self.windows

    @property
    def ppl(self) -> float:
        """Perplexity; infinite where the mean NLL is beyond the range of exp."""
        return ppl_of(self.nll)


def ppl_of(nll: float) -> float:
    """The perplexity of a mean NLL in nats; infinite beyond the range of exp."""
    return math.exp(nll) if not nll > 700 else math.inf


def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    window: int = 2048,
    limit: int | None = None,
    batch: int = 1,
    bos: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `model` on `ids` int64 [tokens], tokenised in one piece.

    `limit` takes the first windows only; tokens after the last whole window are left out.  `batch`
    windows go through the model together.  With `bos` a window is that id and `window - 1` tokens.
    `device` is where the ids are put (default: where the model is; the model is not moved).
    Raises ValueError: too few tokens, ids outside the vocabulary, window beyond the model's
    positions, model in training mode.
    """
    cut = cut_windows(ids, window, limit=limit, bos=bos)
    check_model(model, cut)
    found: list[Tensor] = []
    for start in range(0, len(cut), batch):
        rows = cut[start : start + batch]
        logits = forward(model, rows, device)
        found += [token_nlls(one, row) for one, row in zip(logits, rows, strict=True)]
        if progress is not None:
            progress(len(found), len(cut))
    return Perplexity.of(found, window, bos)


def cut_windows(
    ids: Tensor, window: int, *, limit: int | None = None, bos: int | None = None
) -> Tensor:
    """Non-overlapping windows [windows, window] of `ids` [tokens]; `bos` as in `perplexity`.

    Raises ValueError if there is no whole window, or `window` or `limit` is too small.
    """
    assert ids.dim() == 1, f"ids must be [tokens], not {list(ids.shape)}"
    if window < 2 or (limit is not None and limit < 1):
        raise ValueError(
            "the evaluation windows are impossible\n"
            f"window {window}, limit {limit}\n"
            "use a window of 2 or more tokens and a limit of 1 or more windows"
        )
    step = window if bos is None else window - 1
    count = ids.numel() // step
    if count == 0:
        raise ValueError(
            "the evaluation text is too short\n"
            f"{ids.numel()} tokens found, {step} needed for one window\n"
            "give more text, or set a shorter window"
        )
    cut = ids[: count * step].view(count, step)[:limit]
    return cut if bos is None else F.pad(cut, (1, 0), value=bos)


def check_model(model: PreTrainedModel, cut: Tensor) -> None:
    """Refuse windows `cut` [windows, window] that `model` cannot take.  Raises ValueError."""
    text = model.config.get_text_config()
    name = "max_position_embeddings"
    positions = text.to_dict().get(text.attribute_map.get(name, name))
    if positions is not None and cut.shape[1] > positions:
        raise ValueError(
            "the evaluation windows are longer than the model allows\n"
            f"window {cut.shape[1]}, positions of the model {positions}\n"
            f"set a window of {positions} or less"
        )
    if int(cut.max()) >= text.vocab_size:
        raise ValueError(
            "the tokens come from the tokenizer of another model\n"
            f"highest id {int(cut.max())}, vocabulary of the model {text.vocab_size}\n"
            "use the tokenizer that belongs to this model"
        )
    if model.training:
        raise ValueError(
            "the model is in training mode\n"
            f"{type(model).__name__}: dropout would make the figures random\n"
            "call model.eval() first"
        )


@torch.inference_mode()
def forward(model: PreTrainedModel, rows: Tensor, device: torch.device | str | None) -> Tensor:
    """Logits [batch, window - 1, vocabulary] in the model's dtype for `rows` [batch, window].

    The last position is left out: what it predicts is not in the window.
    """
    inputs = rows.to(model.device if device is None else device)
    logits: Tensor = model(input_ids=inputs, use_cache=False).logits
    return logits[:, :-1]


def chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of positions of `logits` [positions, vocabulary], CHUNK values each at most."""
    rows = max(1, CHUNK // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


@torch.inference_mode()
def token_nlls(logits: Tensor, row: Tensor) -> Tensor:
    """NLL in nats, float64 [window - 1] on the CPU, of `row` [window] under `logits`.

    logits: [window - 1, vocabulary] in any dtype; the log-softmax is computed in float32.
    """
    labels = row[1:].to(logits.device)
    parts = [
        F.cross_entropy(logits[part].float(), labels[part], reduction="none")
        for part in chunks(logits)
    ]
    return torch.cat(parts).double().cpu()


def position_bins(window: int) -> list[tuple[int, int]]:
    """First and last number of tokens seen, for logarithmic bins: 1, 2 to 3, 4 to 7, ..."""
    return [(1 << bit, min((2 << bit) - 1, window - 1)) for bit in range((window - 1).bit_length())]


def by_position(values: Tensor) -> tuple[float, ...]:
    """Means of `values` [window - 1] in the bins of `position_bins`."""
    bins = position_bins(len(values) + 1)
    return tuple(values[first - 1 : last].mean().item() for first, last in bins)
