"""Judge: what a whole plan really costs, as KL(original || compressed) of the next tokens.

Two walks with one block in memory, then the model's own tail on both last hidden states.  With it
relative scores get a unit (fit_factor), and a ranking is held against its reverse (validity).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from aptq.core.plan import Plan
from aptq.core.profile import Profiles
from aptq.core.scores import Scores
from aptq.engine.block import Block
from aptq.engine.candidate import exact
from aptq.engine.heap import trim_heap
from aptq.engine.measure import Subject
from aptq.engine.stream import Stream
from aptq.engine.tail import logits, pieces
from aptq.engine.walk import walk
from aptq.model.model import Model


def divergence(wanted: Tensor, got: Tensor) -> Tensor:
    """KL(wanted || got) in nats of logits [..., vocabulary]; float64 [...]."""
    target, ours = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
    kl = F.kl_div(ours, target, reduction="none", log_target=True)
    return kl.sum(dim=-1, dtype=torch.float64)


@torch.inference_mode()
def compare(model: Model, wanted: Tensor, got: Tensor, ids: Tensor, first: int = 0) -> Tensor:
    """Sums of the divergence over the tokens of even and of odd windows, float64 [2].

    wanted, got: last hidden states [windows, length, width] of `ids` [windows, length], whose first
    window has number `first`.  The outer weights must be loaded, on the device of `got`.
    """
    total = torch.zeros(2, dtype=torch.float64, device=got.device)
    vocabulary = model.config.get_text_config().vocab_size
    for windows, tokens in pieces((ids.shape[0], ids.shape[1]), vocabulary):
        part = ids[windows, tokens].to(got.device)
        theirs = logits(model, wanted[windows, tokens].to(got.device), part)
        ours = logits(model, got[windows, tokens], part)
        kl = divergence(theirs, ours).sum(dim=1)
        for row, value in enumerate(kl, start=first + windows.start):
            total[row % 2] += value
    return total.cpu()


def reference(subject: Subject) -> Stream:
    """The original's last hidden states of all windows, for many judgements; to be closed."""
    model, stream = subject.model, subject.stream("reference")
    for index in range(model.blocks):
        stream.advance(index, model.load(index, subject.device))
        model.unload(index)
        trim_heap()
    return stream


def judge(subject: Subject, plan: Plan, wanted: Stream | None = None) -> float:
    """KL in nats per token of the model compressed by `plan` with the stages of the subject.

    Measured on the windows that it was calibrated on, at every position.  wanted: `reference` of
    this subject.
    """
    model, ids = subject.model, subject.ids
    original = reference(subject) if wanted is None else wanted
    stream = subject.stream()

    def sink(block: Block) -> None:
        if block.index + 1 == model.blocks:
            stream.advance(block.index, block.module)

    walk(
        model,
        stream,
        subject.stages,
        plan,
        order=subject.order,
        sink=sink,
        profiles=subject.profiles,
    )
    model.load_outer(subject.device)
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(ids), stream.batch):
        some = slice(start, start + stream.batch)
        got = stream.hidden[some].to(subject.device)
        total += compare(model, original.hidden[some], got, ids[some], start)
    model.unload_outer()
    stream.close()
    if wanted is None:
        original.close()
    return float(total.sum()) / ids.numel()


def fit_factor(subject: Subject, scores: Scores, windows: int = 8) -> Scores:
    """The scores with `factor` and `residual`, from the measured divergence of uniform plans.

    Three plans: all layers at the smallest, the middle and the largest candidate below 16 bits, on
    the first `windows` windows.  The factor is the least-squares fit of log KL to log of the
    predicted loss, the residual the root mean square of what is left.  Unchanged if fewer than
    two of the plans have a positive loss, as in a table that does not depend on the candidate.
    """
    profiles = subject.profiles or profiles_of(scores)
    subject = replace(subject, ids=subject.ids[:windows], profiles=profiles)
    ranked = [number for number in subject.ranked() if not exact(subject.targets[number])]
    chosen = dict.fromkeys((ranked[0], ranked[len(ranked) // 2], ranked[-1]))
    logs, original = [], reference(subject)
    for number in chosen:
        predicted = math.fsum(max(row[number], 0.0) for row in scores.losses.values())
        if predicted > 0:
            measured = judge(subject, subject.plan(subject.targets[number]), original)
            logs.append(math.log(measured / predicted) if measured > 0 else -math.inf)
    original.close()
    if len(logs) < 2 or not all(map(math.isfinite, logs)):
        return scores
    mean = math.fsum(logs) / len(logs)
    residual = math.sqrt(math.fsum((value - mean) ** 2 for value in logs) / len(logs))
    return replace(scores, factor=math.exp(mean), residual=residual)


def profiles_of(scores: Scores | None) -> Profiles | None:
    """The profiles that came with the scores, if they have any."""
    if scores is None or not scores.profiles:
        return None
    tensors = {name: torch.tensor(row) for name, row in scores.profiles.items()}
    return Profiles(scores.window, tensors)


@dataclass(frozen=True, slots=True)
class Validity:
    """KL in nats per token with a share of the weights at the low candidate, the rest at the high.

    The share goes to the layers with the highest scores, the lowest ones, or any.
    """

    share: float
    top: float
    bottom: float
    random: float

    @property
    def difference(self) -> float:
        """(top - bottom) / random: about 0 or less for a ranking that means nothing."""
        return (self.top - self.bottom) / self.random if self.random > 0 else 0.0


def validity(
    subject: Subject,
    scores: Scores,
    shares: Sequence[float] = (0.1, 0.25, 0.5),
    *,
    per_weight: bool = True,
) -> list[Validity]:
    """Does the ranking mean anything?  After DiffROAR (arXiv:2102.12781), for layers and bits.

    Layers are ranked by the loss that the largest candidate saves over the smallest, per weight
    unless the table's numbers are so already, as those of `trace` are.
    """
    ranked, names = subject.ranked(), sorted(subject.names - {*subject.outside})
    low, high = subject.targets[ranked[0]], subject.targets[ranked[-1]]
    subject = replace(subject, profiles=subject.profiles or profiles_of(scores))
    weights = {name: math.prod(subject.model.shapes[name]) for name in names}

    def worth(name: str) -> float:
        row = scores.losses[name]
        return (row[ranked[0]] - row[ranked[-1]]) / (weights[name] if per_weight else 1)

    order = sorted(names, key=worth, reverse=True)
    generator = torch.Generator().manual_seed(subject.seed)
    mixed = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    found, original = [], reference(subject)
    for share in shares:
        values = []
        for arm in (order, order[::-1], mixed):
            lowered = dict.fromkeys(_first(arm, weights, share), low)
            values.append(judge(subject, subject.plan(high, lowered), original))
        found.append(Validity(share, *values))
    original.close()
    return found


def _first(order: Sequence[str], weights: dict[str, int], share: float) -> list[str]:
    """The first layers of `order` that have at most this share of the weights, at least one."""
    limit, taken = share * sum(weights.values()), 0
    for count, name in enumerate(order):
        taken += weights[name]
        if taken > limit:
            return list(order[: max(count, 1)])
    return list(order)
