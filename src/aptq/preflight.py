"""Preflight: what is bound to go wrong is found in seconds, before hours of work.

Opening a model has checked its files, names and shapes by now, and the data source was looked
into.  Here come the plans, what they need of disk and memory, and one pass over all weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from aptq.core.plan import Plan, Target
from aptq.core.problem import code_bits
from aptq.core.scores import Scores
from aptq.effort import effort
from aptq.engine.stream import free_bytes
from aptq.failures import Shortage
from aptq.model.model import Model
from aptq.model.sources import refuse
from aptq.model.weights import count_nonfinite, listed
from aptq.planner import Choice
from aptq.planning import blank, choosable, choose, ragged, wants_scores
from aptq.recipe import Recipe
from aptq.work import Report


@dataclass(frozen=True, kw_only=True)
class Allow:
    """What a run may accept; the defaults refuse it."""

    nonfinite: bool = False  # matrices that hold NaN or Inf stay as they are
    partial: bool = False  # more than 5 % of a block's weights outside all known linears


NOTHING = Allow()


def preflight(
    model: Model,
    recipe: Recipe,
    plan: Plan | None,
    scores: Scores | None,
    allow: Allow,
    report: Report,
) -> tuple[Recipe, Plan | None, list[Choice]]:
    """Recipe, plan and choices as they can be carried out, or the error that would come later.

    Raises Infeasible where no plan fits, ValueError for weights that are not finite.
    """
    choices = rehearse(model, recipe, plan, scores)
    found = nonfinite(model, allow)
    kept = [name for name in choosable(model, recipe) if _below(name, found)]
    if found:
        report(f"not finite, hence kept as they are: {listed(found)}")
    if kept and plan is not None:
        plan = Plan({**plan.targets, **{n: Target() for n in kept if n in plan.targets}})
    elif kept:
        recipe = replace(recipe, keep=(*recipe.keep, *kept))
        choices = rehearse(model, recipe, plan, scores)
    for note in _notes(model, recipe, plan, choices):
        report(note)
    return recipe, plan, choices


def check_measure(recipe: Recipe) -> None:
    """Raise ValueError where the recipe measures nothing, or cannot measure what it wants."""
    if recipe.measure is None:
        raise ValueError(
            "there is nothing to choose by\nthe recipe has no [measure] table\n"
            "add one with use = 'fisher', say, or give --scores FILE"
        )
    recipe.measure.check(["outer = true"] if recipe.outer else [], recipe.stages)


def rehearse(
    model: Model, recipe: Recipe, plan: Plan | None, scores: Scores | None
) -> list[Choice]:
    """A choice for every budget; raises what choosing will raise, before anything is measured."""
    if scores is None and wants_scores(recipe, plan):
        check_measure(recipe)
        scores = blank(model, recipe)
    budgets = recipe.budgets if plan is None else (recipe.budget,)
    return [choose(model, replace(recipe, budget=b), plan, scores) for b in budgets]


def check_needs(
    model: Model,
    recipe: Recipe,
    choices: Sequence[Choice],
    reserve: Callable[[int], None],
    device: torch.device,
    report: Report,
) -> None:
    """Refuse what the disk or the memory cannot hold, before anything is measured.

    reserve: raises Shortage where the disk has no room for so many bytes.  Hidden states and
    statistics are left out of the memory: they go to the disk, or are collected in slices.
    """
    needs = [effort(model, recipe, one.plan, one.nbytes, device) for one in choices]
    extra = max(need.disk - one.nbytes for need, one in zip(needs, choices, strict=True))
    reserve(sum(one.nbytes for one in choices) + extra)
    need = max(needs, key=lambda one: one.memory)
    firm = need.memory - need.parts["hidden states"] - need.parts["statistics"]
    whole = int(psutil.virtual_memory().total)
    if device.type == "cuda":
        whole = torch.cuda.mem_get_info(device)[1]
    if firm > whole:
        most = sorted(need.parts, key=lambda part: -need.parts[part])[:3]
        raise Shortage(
            f"the memory of {device.type} is too small for this recipe\n{firm:,} bytes needed, "
            f"{whole:,} there; most of it {', '.join(f'{p} {need.parts[p]:,}' for p in most)}\n"
            "use --recipe small-memory, shorter windows, or a machine with more memory"
        )
    free = free_bytes(device)
    word = "of" if need.memory <= free else "but only"
    beside = f"; {need.host:,} of RAM beside" if need.host else ""
    report(f"memory: about {need.memory:,} bytes needed, {word} {free:,} free{beside}")


def nonfinite(model: Model, allow: Allow) -> list[str]:
    """Parameters that hold NaN or Inf, which the model tolerates from here on."""
    found: dict[str, str] = {}
    for tensor, names in model.stored():
        if bad := count_nonfinite(tensor, model.dtype):
            found |= dict.fromkeys(names, f"{bad:,} of {tensor.numel():,}")
    if found and not allow.nonfinite:
        refuse(
            f"{len(found)} weights are not finite in {model.dtype}",
            listed(f"{name}: {count} values are NaN or Inf" for name, count in found.items()),
            "repair or download the model again, or keep them as they are with "
            "--allow-nonfinite keep",
        )
    model.tolerated = frozenset(found)
    return list(found)


def _below(layer: str, parameters: Sequence[str]) -> bool:
    """Does a layer hold one of the parameters, or a part of it where normalising splits it?"""
    modules = (name.rpartition(".")[0] for name in parameters)
    return any(layer == module or layer.startswith(f"{module}.") for module in modules)


def _notes(model: Model, recipe: Recipe, plan: Plan | None, choices: Sequence[Choice]) -> list[str]:
    """What a person should know of the plans."""
    notes = []
    for budget, one in zip(recipe.budgets, choices, strict=False):
        shapes = {**model.shapes, **model.outer_shapes}
        notes += ragged(one.plan, shapes)
        whole = all(code_bits(target) == 16 for target in one.plan.targets.values())
        if budget and plan is None and whole:
            notes.append(f"note: budget {budget} is above what the model takes: all stays 16 bit")
    columns = max((shape[1] for shape in model.shapes.values()), default=0)
    tokens = recipe.data.total
    if any(stage.reads for stage in recipe.stages) and tokens < columns:
        notes.append(f"note: fewer tokens than columns ({tokens:,} < {columns:,}): add samples")
    return list(dict.fromkeys(notes))
