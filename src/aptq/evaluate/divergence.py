"""KL(reference || model) of next-token distributions on the same windows, and top-1 agreement.

One forward pass of each model gives the perplexity of both as well.  The reference is a model, or a
folder of its logits written before, where two models do not fit in memory together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from aptq.evaluate.perplexity import (
    Perplexity,
    Progress,
    by_position,
    check_model,
    chunks,
    cut_windows,
    forward,
    token_nlls,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """KL in nats a token and share of equal top-1 tokens, of each window.

    Taken at the positions that perplexity predicts at; `model` and `reference` are the
    perplexities of the two on these windows, `binned` the mean KL of each window in the bins of
    `position_bins`.  The sum of two is that of the windows of both.
    """

    kls: tuple[float, ...]
    agreements: tuple[float, ...]
    model: Perplexity
    reference: Perplexity
    binned: tuple[tuple[float, ...], ...] = ()

    def __add__(self, more: Self) -> Self:
        return type(self)(
            self.kls + more.kls,
            self.agreements + more.agreements,
            self.model + more.model,
            self.reference + more.reference,
            self.binned + more.binned,
        )

    @property
    def kl(self) -> float:
        """Mean KL(reference || model) in nats a token."""
        return math.fsum(self.kls) / len(self.kls)

    @property
    def agreement(self) -> float:
        """Share of tokens where both models rate the same token highest."""
        return math.fsum(self.agreements) / len(self.agreements)


def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel | Path,
    ids: Tensor,
    *,
    window: int = 2048,
    limit: int | None = None,
    bos: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Divergence of `model` from `reference` on `ids` int64 [tokens], window by window.

    `reference` is a model, or a folder that `save_logits` wrote for the same windows.  The other
    arguments are those of `perplexity`; `device` is for the ids of `model`.  Raises ValueError as
    `perplexity` does, for logits of other windows and for models of different vocabularies.
    """
    cut = cut_windows(ids, window, limit=limit, bos=bos)
    check_model(model, cut)
    if not isinstance(reference, Path):
        check_model(reference, cut)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []  # KL and both NLLs: float64 [window - 1]
    agreements: list[float] = []
    for index, row in enumerate(cut):
        if isinstance(reference, Path):
            wanted = _load(reference, index, row)
        else:
            wanted = forward(reference, row[None], None)[0]
        got = forward(model, row[None], device)[0]
        kl, equal = _compare(got, wanted)
        rows.append((kl, token_nlls(got, row), token_nlls(wanted, row)))
        agreements.append(equal)
        if progress is not None:
            progress(index + 1, len(cut))
    kls, ours, theirs = zip(*rows, strict=True)
    return Divergence(
        tuple(kl.mean().item() for kl in kls),
        tuple(agreements),
        Perplexity.of(ours, window, bos),
        Perplexity.of(theirs, window, bos),
        tuple(map(by_position, kls)),
    )


def save_logits(
    model: PreTrainedModel,
    ids: Tensor,
    folder: Path,
    *,
    window: int = 2048,
    limit: int | None = None,
    bos: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the logits of `model` for `divergence`: one file a window, in the model's dtype.

    A window takes (window - 1) * vocabulary * itemsize bytes: 192 MiB at 2048, 49,152 and bf16.
    Arguments and errors are those of `perplexity`.
    """
    cut = cut_windows(ids, window, limit=limit, bos=bos)
    check_model(model, cut)
    folder.mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(cut):
        logits = forward(model, row[None], device)[0]
        tensors = {"logits": logits.cpu().contiguous(), "ids": row.clone()}
        save_file(tensors, _file(folder, index))
        if progress is not None:
            progress(index + 1, len(cut))


def _file(folder: Path, index: int) -> Path:
    return folder / f"logits-{index:05d}.safetensors"


def _load(folder: Path, index: int, row: Tensor) -> Tensor:
    """Stored logits [window - 1, vocabulary] of window `index`; its ids must be `row` [window]."""
    path = _file(folder, index)
    if not path.is_file():
        raise ValueError(
            "the reference has fewer windows than the evaluation\n"
            f"{folder}: no logits of window {index}\n"
            "save the logits again with the same limit"
        )
    tensors = load_file(path)
    if not torch.equal(tensors["ids"], row.cpu()):
        raise ValueError(
            "the reference was taken on other tokens\n"
            f"{path}: the ids of window {index} differ\n"
            "save the logits again with the same text, window and bos"
        )
    return tensors["logits"]


@torch.inference_mode()
def _compare(got: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """KL(wanted || got), float64 [positions] on the CPU, and the share of equal argmax.

    got, wanted: logits [positions, vocabulary].
    """
    if got.shape != wanted.shape:
        raise ValueError(
            "the two models have different vocabularies\n"
            f"model {got.shape[1]}, reference {wanted.shape[1]}\n"
            "compare a model with its own original"
        )
    kls: list[Tensor] = []
    equal = 0
    for part in chunks(got):
        ours = F.log_softmax(got[part].float(), dim=-1)
        theirs = F.log_softmax(wanted[part].to(got.device).float(), dim=-1)
        kls.append(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1))
        equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return torch.cat(kls).double().cpu(), equal / len(got)
