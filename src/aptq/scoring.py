"""The measuring pass of a run: scores of all candidates, and the profiles that row weights need."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from aptq.core.plan import Plan
from aptq.core.profile import Profiles
from aptq.core.scores import Scores
from aptq.engine.backward import Labels, Observed, backward_walk
from aptq.engine.judge import fit_factor
from aptq.engine.measure import Subject
from aptq.engine.siblings import lent
from aptq.engine.tape import open_tape
from aptq.engine.walk import Progress
from aptq.planning import (
    candidates,
    choosable,
    kept_names,
    measuring_bytes,
    measuring_data,
    wants_profiles,
)
from aptq.recipe import Recipe
from aptq.runfolder import RunFolder
from aptq.stats.gradient import Gradient, gradient
from aptq.stats.importance import Importance
from aptq.work import Work


def score(work: Work, recipe: Recipe, folder: Path) -> Scores:
    """The recipe's measure on all layers that it does not keep; with profiles, if wanted.

    Hidden states may lie in `folder`.
    """
    measure, model = recipe.measure, work.model
    assert measure is not None, "the recipe measures nothing"
    if (kept := work.recall("scores")) is not None:
        return Scores.load(kept)
    profiles = None
    # else it finds them on its way, which is too late for walks before it
    if wants_profiles(recipe) and (measure.tuned or not measure.backward):
        profiles = measure_profiles(work, recipe, folder)
    subject = Subject(
        model=model,
        ids=_windows(work, recipe),
        device=work.device,
        folder=folder,
        where=work.activations,
        stages=recipe.stages,
        targets=candidates(recipe),
        names=frozenset(choosable(model, recipe).keys() - kept_names(model, recipe).keys()),
        seed=recipe.seed,
        report=lambda done: work.show(done.phase or "measure", done),
        profiles=profiles,
        order=recipe.order,
    )
    kept = work.recall("table")
    if kept is None:
        found = measure.run(subject)
        found = replace(found, losses=lent(found.losses), noise=lent(found.noise))
    else:
        found = Scores.load(kept)
    if recipe.nats and found.unit == "relative":
        work.remember("table", found.text())
        fitting = replace(subject, report=lambda done: work.show("fit nats", done))
        found = fit_factor(fitting, found)
    work.remember("scores", found.text())
    return found


def measure_profiles(work: Work, recipe: Recipe, folder: Path) -> Profiles:
    """Mean squared output gradients of every layer by position, from one backward walk."""
    ids = _windows(work, recipe)
    if work.recall("profiles") is not None:
        return Profiles(ids.shape[1], work.journals[0].tensors("profiles"))
    found: dict[str, Tensor] = {}

    def visit(block: Observed) -> None:
        block.observe([Gradient()])
        for name, layer in block.layers.items():
            profile = gradient(layer).profile()
            if profile is not None:
                found[name] = profile.cpu()

    _walk_back(work, recipe, folder, "profile", visit)
    work.remember("profiles", found)
    return Profiles(ids.shape[1], found)


def measure_marks(work: Work, recipe: Recipe, plan: Plan, run: RunFolder) -> dict[str, Tensor]:
    """Places of outliers that stages choose by gradients of the loss, from one backward walk."""
    if run.state.path("marks") is not None:
        return run.state.tensors("marks")
    traced = next(stage for stage in recipe.stages if stage.traced)
    found: dict[str, Tensor] = {}

    def visit(block: Observed) -> None:
        counts = {}
        for name, layer in block.layers.items():
            layer.target = plan.targets[name]
            if (spec := layer.target.part("sparse")) is not None:
                counts[name] = spec.count((layer.weight.shape[0], layer.weight.shape[1]))
        if counts:
            block.observe([Importance()], [block.layers[name] for name in counts])
        for name, count in counts.items():
            places = traced.places(block.layers[name], count)
            if places is not None:
                found[name] = places.cpu()

    run.reserve(measuring_bytes(work.model, recipe, False))
    _walk_back(work, recipe, run.work, "mark", visit, labels="data")
    run.state.put_tensors("marks", found)
    run.state.publish()
    return found


def _walk_back(
    work: Work,
    recipe: Recipe,
    folder: Path,
    phase: str,
    visit: Callable[[Observed], None],
    labels: Labels = "sampled",
) -> None:
    """Visit all blocks with the gradients of the loss of the measured windows."""
    model, ids = work.model, _windows(work, recipe)
    tape = open_tape(model, ids, device=work.device, folder=folder, where=work.activations)

    def report(done: Progress) -> None:
        work.show(phase, done)

    backward_walk(model, tape, ids, visit, labels=labels, seed=recipe.seed, report=report)


def _windows(work: Work, recipe: Recipe) -> Tensor:
    """The windows that are measured, [windows, length]: the first ones of the calibration."""
    assert work.batches is not None, "nothing to measure on"
    return work.batches.ids[: measuring_data(recipe.data).samples]
