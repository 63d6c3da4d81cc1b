"""The model as lm-eval sees it, with its choices scored in few operations.

lm-eval runs context and choice through the model anew for every choice.  Here contexts of one
length go through together, once, and their choices continue from the cache: no padding in the
contexts, and a third of the tokens for four choices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from aptq.evaluate.perplexity import Progress, chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 1024  # of one forward pass: fills two cores and a small GPU, 200 MB of 49,152 logits
PAD = -100  # label of a position that is none
Pair = tuple[list[int], list[int]]  # ids of context and continuation
Answer = tuple[float, bool]  # log-likelihood in nats, and whether every token is the likeliest


class Scorer(HFLM):  # type: ignore[misc]
    """lm-eval's own wrapper of a transformers model but for how log-likelihoods are computed.

    Log-softmax is in float32 whatever the model's dtype is: in bfloat16 choices would tie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
        self.progress = progress
        self.shared = _can_branch(model)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """As lm-eval's; progress is shown by the caller."""
        found: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        pairs = [self._cut(context, more) for _, context, more in requests]
        found: dict[int, Answer] = {}
        for batch in batches(pairs, shared=self.shared):
            score = score_branches if self.shared else score_rows
            answers = score(self.model, [pairs[index] for index in batch])
            found |= dict(zip(batch, answers, strict=True))
            if self.progress is not None:
                self.progress(len(found), len(pairs))
        return [found[index] for index in range(len(pairs))]

    def _cut(self, context: list[int], more: list[int]) -> Pair:
        """What fits in the model's positions: contexts lose their beginning, as in lm-eval."""
        assert context, "lm-eval puts a token where a context is empty"
        assert 0 < len(more) <= self.max_length, (len(more), self.max_length)
        return context[max(0, len(context) + len(more) - self.max_length - 1) :], more


def _can_branch(model: PreTrainedModel) -> bool:
    """Whether several texts can go on from one cache: it holds keys and values and no states."""
    with torch.inference_mode():
        first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        cache = model(input_ids=first, use_cache=True).past_key_values
    return cache is not None and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def batches(pairs: Sequence[Pair], *, shared: bool) -> Iterator[list[int]]:
    """Numbers of `pairs` that go together, longest first, about TOKENS tokens a batch.

    shared: contexts of a batch have one length, and equal ones count once.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (context, more) in enumerate(pairs):
        groups[tuple(context if shared else context + more)].append(index)
    batch: list[int] = []
    used = length = 0
    for key in sorted(groups, key=lambda key: (-len(key), key)):
        group = groups[key]
        size = len(key) + (sum(len(pairs[index][1]) for index in group) if shared else 0)
        if batch and (used + size > TOKENS or (shared and len(key) != length)):
            yield batch
            batch, used = [], 0
        batch, used, length = batch + group, used + size, len(key)
    if batch:
        yield batch


@torch.inference_mode()
def score_branches(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Answer]:
    """Answers for `pairs` whose contexts have one length; a context runs once."""
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    number = {context: row for row, context in enumerate(contexts)}
    rows = torch.tensor([number[tuple(context)] for context, _ in pairs], device=model.device)
    out = model(input_ids=torch.tensor(contexts, device=model.device), use_cache=True)
    logits = out.logits[:, -1:][rows]
    inputs = _padded([more[:-1] for _, more in pairs], 0).to(model.device)
    if inputs.shape[1]:
        out.past_key_values.batch_select_indices(rows)
        more = model(input_ids=inputs, past_key_values=out.past_key_values, use_cache=True)
        logits = torch.cat([logits, more.logits], 1)
    return _answers(logits, _padded([more for _, more in pairs], PAD))


@torch.inference_mode()
def score_rows(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Answer]:
    """Answers for `pairs`, each a row of its own, padded on the right."""
    inputs = _padded([(context + more)[:-1] for context, more in pairs], 0)
    labels = _padded([[PAD] * (len(context) - 1) + more for context, more in pairs], PAD)
    out = model(input_ids=inputs.to(model.device), use_cache=False)
    return _answers(out.logits, labels)


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """int64 [rows, longest], filled up on the right."""
    longest = max(map(len, rows))
    filled = [row + [value] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.long).view(len(rows), longest)


def _answers(logits: Tensor, labels: Tensor) -> list[Answer]:
    """One answer for each row of `labels` [rows, positions], under logits [..., vocabulary]."""
    flat, wanted = logits.flatten(0, 1), labels.flatten().to(logits.device)
    nlls, likeliest = [], []
    for part in chunks(flat):
        values = flat[part].float()
        nlls.append(F.cross_entropy(values, wanted[part], ignore_index=PAD, reduction="none"))
        likeliest.append((values.argmax(-1) == wanted[part]) | (wanted[part] == PAD))
    sums = torch.cat(nlls).double().view(labels.shape).sum(1)
    equal = torch.cat(likeliest).view(labels.shape).all(1)
    return [(-nll, same) for nll, same in zip(sums.tolist(), equal.tolist(), strict=True)]
