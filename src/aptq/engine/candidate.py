"""The errors of candidates: what a recipe's stages make of one layer at each target."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

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
    """What all stages together make of the layer at each target, [out, in]."""
    if len(stages) == 2 and stages[1].adds:
        yield from _extended(layer, targets, *stages)
        return
    for target in targets:
        scratch = replace(layer, target=target, parts=[])
        for stage in stages:
            scratch = stage.on_layer(scratch)
        yield scratch.dense()


def _extended(
    layer: Layer, targets: Sequence[Target], first: Stage, second: Stage
) -> Iterator[Tensor]:
    """As `_made`; targets that differ in what `second` adds to them share all else."""
    alike: dict[Target, list[Target]] = {}
    for target in targets:
        alike.setdefault(Target(tuple(x for x in target.parts if not x.rank)), []).append(target)
    made: dict[Target, Tensor] = {}
    for base, (_, some) in zip(first.attempt(layer, list(alike)), alike.items(), strict=True):
        made |= zip(some, second.extend(layer, base, some), strict=True)
    yield from (made[target] for target in targets)
