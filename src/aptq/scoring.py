"""The measuring pass of a run: scores of all candidates, and the profiles that row weights need."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from aptq.core.profile import Profiles
from aptq.core.scores import Scores
from aptq.engine.backward import Observed, backward_walk
from aptq.engine.judge import fit_factor
from aptq.engine.measure import Subject
from aptq.engine.tape import open_tape
from aptq.engine.walk import Progress
from aptq.planning import candidates, choosable, kept_names, measuring_data, wants_profiles
from aptq.recipe import Recipe
from aptq.stats.gradient import Gradient, gradient
from aptq.work import Work


def score(work: Work, recipe: Recipe, folder: Path) -> Scores:
    """The recipe's measure on all layers that it does not keep; with profiles, if wanted.

    Hidden states may lie in `folder`.
    """
    measure, model = recipe.measure, work.model
    assert measure is not None, "the recipe measures nothing"
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
    found = measure.run(subject)
    if recipe.nats and found.unit == "relative":
        fitting = replace(subject, report=lambda done: work.show("fit nats", done))
        found = fit_factor(fitting, found)
    return found


def measure_profiles(work: Work, recipe: Recipe, folder: Path) -> Profiles:
    """Mean squared output gradients of every layer by position, from one backward walk."""
    ids = _windows(work, recipe)
    found: dict[str, Tensor] = {}

    def visit(block: Observed) -> None:
        block.observe([Gradient()])
        for name, layer in block.layers.items():
            profile = gradient(layer).profile()
            if profile is not None:
                found[name] = profile.cpu()

    def report(done: Progress) -> None:
        work.show("profile", done)

    tape = open_tape(work.model, ids, device=work.device, folder=folder, where=work.activations)
    backward_walk(work.model, tape, ids, visit, seed=recipe.seed, report=report)
    return Profiles(ids.shape[1], found)


def _windows(work: Work, recipe: Recipe) -> Tensor:
    """The windows that are measured, [windows, length]: the first ones of the calibration."""
    assert work.batches is not None, "nothing to measure on"
    return work.batches.ids[: measuring_data(recipe.data).samples]
