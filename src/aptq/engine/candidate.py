"""The errors of candidates: what a recipe's stages make of one layer at each target."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from aptq.core.plan import Target
from aptq.engine.finished import Finished
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage


def exact(target: Target) -> bool:
    """True where no stage has work: kept, or stored in 16 bits."""
    return target.kept or (target.grid is not None and target.grid.dense)


def errors(
    layer: Layer,
    targets: Sequence[Target],
    stages: Sequence[Stage],
    finished: Finished | None = None,
) -> Iterator[Tensor]:
    """dW = Q - W float32 [out, in] for each target, made by the stages from `layer.stats`.

    Exactly 0 where a 16-bit target stores the weight as it is.  What the stages count is added to
    `layer.counts`.  Where all is `finished` the stages are not asked.
    """
    shape = (layer.weight.shape[0], layer.weight.shape[1])
    lossy = [target for target in targets if not exact(target) and target.fits(shape)]
    stages = [stage for number, stage in enumerate(stages) if not number or stage.changes]
    if finished is not None:
        made: Iterator[Tensor] = (finished.dense(layer, target) for target in lossy)
    elif len(stages) == 1:
        made = stages[0].attempt(layer, lossy)
    else:
        made = _made(layer, lossy, stages)
    for target in targets:
        if target.kept or not target.fits(shape):  # what cannot be stored is never chosen
            yield torch.zeros_like(layer.weight)
        elif exact(target):
            yield layer.weight.to(torch.bfloat16).float() - layer.weight
        else:
            yield next(made) - layer.weight


def _made(layer: Layer, targets: Sequence[Target], stages: Sequence[Stage]) -> Iterator[Tensor]:
    """What all stages together make of the layer at each target, [out, in].

    Neighbours among the targets that differ only in what the last stage adds share all else.
    """
    last = stages[-1]
    if not last.adds:
        yield from _bodies(layer, targets, stages)
        return
    runs = [(base, list(some)) for base, some in groupby(targets, key=_without_factors)]
    bodies = _bodies(layer, [base for base, _ in runs], stages[:-1])
    for made, (_, some) in zip(bodies, runs, strict=True):
        yield from last.extend(layer, made, some)


def _bodies(layer: Layer, targets: Sequence[Target], stages: Sequence[Stage]) -> Iterator[Tensor]:
    """As `_made`; stages that mark outliers are left out where a target has none."""
    for sparse, some in groupby(targets, key=lambda target: target.part("sparse") is not None):
        used = [stage for stage in stages if sparse or not stage.marks]
        if len(used) == 1:
            yield from used[0].attempt(layer, list(some))
            continue
        for target in some:
            scratch = replace(layer, target=target, parts=[])
            for stage in used:
                scratch = stage.on_layer(scratch)
            yield scratch.dense()


def _without_factors(target: Target) -> Target:
    return Target(tuple(part for part in target.parts if not part.rank))
