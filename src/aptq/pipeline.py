"""The steps behind the commands: measure, compress, outlook.

Compressing: check output folders and data, open the model, measure, choose the plan of every
budget, walk the blocks, publish.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from aptq.calibrating import calibration
from aptq.core.plan import Plan
from aptq.core.profile import Profiles
from aptq.core.scores import Scores
from aptq.engine.data import check_source
from aptq.engine.judge import profiles_of
from aptq.engine.stream import Where
from aptq.making import make
from aptq.model.model import Model
from aptq.outlook import Outlook, look, recorded
from aptq.planner import Choice
from aptq.planning import choose, kept_tokens, measuring_bytes, wants_profiles, wants_scores
from aptq.preflight import NOTHING, Allow, check_measure, check_needs, nonfinite, preflight
from aptq.recipe import Recipe
from aptq.recording import identity
from aptq.report import card, summary
from aptq.report.summary import Summary
from aptq.runfolder import RunFolder, budget_folder, check_finished, unfinished
from aptq.runtime.open import find_device
from aptq.scoring import measure_marks, measure_profiles, score
from aptq.store.headers import publish
from aptq.store.resume import Resume
from aptq.work import Clock, Report, Step, Work, silent


def plan(
    source: str | Path,
    recipe: Recipe | str = "aptq",
    *,
    scores: Scores | None = None,
    revision: str | None = None,
) -> Choice:
    """What `compress` would do to `source`: plan, bits per weight, bytes; reads no weights.

    Without `scores` it is one grid for all layers, whatever the recipe says.
    """
    return choose(Model.outline(source, revision=revision), _recipe(recipe), None, scores)


def outlook(
    source: str | Path,
    recipe: Recipe | str = "aptq",
    *,
    scores: Scores | None = None,
    context: int = 8192,
    device: str = "auto",
    revision: str | None = None,
    allow: Allow = NOTHING,
) -> Outlook:
    """All that is known before compressing `source`: sizes, needs, losses, the Pareto front.

    A folder with config.json alone is enough; `allow` as in `compress`.  Raises ValueError and
    Infeasible as `compress`.
    """
    model = Model.outline(source, revision=revision, partial=allow.partial)
    return look(model, _recipe(recipe), scores, context, find_device(device))


def measure(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str = "aptq",
    device: str = "auto",
    revision: str | None = None,
    activations: Where = "auto",
    report: Report = silent,
    allow: Allow = NOTHING,
    resume: Resume = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Score every layer of `source` at every candidate of the recipe, into the new file `out`.

    An interrupted call is taken up again, see `compress`, also for `allow`.  Raises ValueError for
    anything wrong with the inputs, before any layer is measured.
    """
    path, chosen, on = Path(out), _recipe(recipe), find_device(device)
    if path.exists() or not path.parent.is_dir():
        reason = "it exists" if path.exists() else "there is no such folder"
        raise ValueError(f"the scores cannot be written\n{path}: {reason}\nchoose another --out")
    check_measure(chosen)
    check_source(chosen.data)
    with RunFolder(path, str(source), resume) as run:
        model = _open(source, revision, report, partial=allow.partial)
        nonfinite(model, allow)
        how = (source, revision, on, report, (run.state,))
        batches = calibration(model, chosen.data, *how)
        report(f"calibration: {batches}")
        work = Work(model, batches, on, activations, report=report, stop=stop)
        _identify(work, [run], {path: chosen}, None, None, verify=False)
        run.reserve(measuring_bytes(model, chosen, True))
        scores = score(work, chosen, run.work)
        publish(path, [scores.text()])
        run.discard()
    return scores


def compress(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str = "aptq",
    plan: Plan | None = None,
    scores: Scores | None = None,
    device: str = "auto",
    revision: str | None = None,
    strict: bool = False,
    activations: Where = "auto",
    report: Report = silent,
    allow: Allow = NOTHING,
    resume: Resume = "auto",
    verify: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Compress the model `source` into the new run folder `out`, by a recipe of one budget.

    `plan` replaces the recipe's choice of grids, `scores` its measuring; `strict` raises Unsound
    where a layer needs a rescue; `activations` says where the hidden states lie ("auto": in memory
    while they are small beside what is free, else on the disk); `allow` accepts what is refused
    otherwise.  An interrupted call leaves its work below `<out>.partial` and the same call goes on
    with it; `resume` "never" refuses such work, "required" its absence; `verify` compares the
    source by SHA-256 then, which reads it once more.  Where `stop` says yes the block at work is
    finished and Stopped raised.  Raises ValueError for anything wrong with the inputs, before any
    weight is read.
    """
    chosen, how = _recipe(recipe), (device, revision, strict, activations, report)
    (done,) = compress_each(
        source, out, chosen, plan, scores, *how, allow, resume, verify, stop
    ).values()
    return done


def compress_each(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    plan: Plan | None,
    scores: Scores | None,
    device: str,
    revision: str | None,
    strict: bool,
    activations: Where,
    report: Report,
    allow: Allow = NOTHING,
    resume: Resume = "auto",
    verify: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[Path, Summary]:
    """`compress` for every budget of the recipe, measured once: run folder -> summary.

    Several budgets get folders of their own below `out`.
    """
    began, on = time.perf_counter(), find_device(device)
    report = clock = Clock(report)
    budgets = recipe.budgets if plan is None else (recipe.budget,)
    with ExitStack() as stack:
        stack.callback(_tidy, Path(out), Path(out).exists())
        paths = [budget_folder(Path(out), b, alone=len(budgets) == 1) for b in budgets]
        left = unfinished(paths, resume)
        runs = [stack.enter_context(RunFolder(x, str(source), resume)) for x in left]
        scoring = scores is None and wants_scores(recipe, plan)
        calibrated = scoring or any(stage.reads for stage in recipe.stages)
        if calibrated:
            check_source(recipe.data)
        model = _open(source, revision, report, partial=allow.partial)
        recipe, plan, choices = preflight(model, recipe, plan, scores, allow, report)
        batches = None
        if calibrated:
            how = (source, revision, on, report, tuple(run.state for run in runs))
            batches = calibration(model, recipe.data, *how)
        report(f"calibration: {batches or 'none of the stages needs data'}")
        check_needs(model, recipe, choices, runs[0].reserve, on, report)
        work = Work(model, batches, on, activations, strict, report, stop=stop)
        single = {path: replace(recipe, budget=b) for path, b in zip(paths, budgets, strict=True)}
        _identify(work, runs, single, plan, scores, verify=verify)
        scores = _measured(work, recipe, scores, scoring, runs[0])
        for run in runs:
            work.check_stop()
            _run(run, work, single[run.out], plan, scores, began, clock)
            began = time.perf_counter()  # measuring counts for the first
    return {path: summary.read(path) for path in paths}


def _identify(
    work: Work,
    runs: Sequence[RunFolder],
    recipes: Mapping[Path, Recipe],
    plan: Plan | None,
    scores: Scores | None,
    *,
    verify: bool,
) -> None:
    """Compare the runs with what they were begun as, those that are complete too.

    Raises ValueError where that was something else.
    """
    whole = verify if runs[0].whole is None else runs[0].whole
    for path, recipe in recipes.items():
        found = identity(work, recipe, plan, scores, whole=whole)
        run = next((run for run in runs if run.out == path), None)
        told = check_finished(path, found) if run is None else run.identify(found)
        for line in told:
            work.report(f"going on although it has changed: {line}")
    work.journals = tuple(run.state for run in runs)


def _measured(
    work: Work, recipe: Recipe, scores: Scores | None, scoring: bool, run: RunFolder
) -> Scores | None:
    """Scores where they are wanted; profiles in `work` where a stage weights rows by them."""
    missing = wants_profiles(recipe) and profiles_of(scores) is None
    if work.batches is not None and (scoring or missing):
        if work.recall("scores") is None:
            run.reserve(measuring_bytes(work.model, recipe, scoring))
        scores = score(work, recipe, run.work) if scoring else scores
    work.profiles = profiles_of(scores)
    if wants_profiles(recipe) and work.profiles is None:
        work.profiles = measure_profiles(work, recipe, run.work)
    return scores


def _tidy(out: Path, wanted: bool) -> None:
    """Remove an empty folder that only a failed call has made."""
    if not wanted and out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _run(
    run: RunFolder,
    work: Work,
    recipe: Recipe,
    plan: Plan | None,
    scores: Scores | None,
    began: float,
    clock: Clock,
) -> None:
    """Choose the plan of one budget, compress by it, publish."""
    choice = choose(work.model, recipe, plan, scores)
    work.report(_decision(choice, recipe, plan))
    run.reserve(choice.nbytes + _states_bytes(work, recipe))
    if any(stage.traced for stage in recipe.stages):
        marks = measure_marks(work, recipe, choice.plan, run)
        work.profiles = (work.profiles or Profiles(0, {}))._replace(marks=marks)
    before = run.state.values.get("seconds", 0.0)  # of work that was interrupted
    written = make(run, work, recipe, choice, scores)
    if scores is not None and recipe.allocate is not None:
        run.log("front", recorded(work.model, recipe, scores))
    run.log("phases", clock.phases)
    seconds = round(before + time.perf_counter() - began, 3)
    run.log("done", {"seconds": seconds, "bytes_after": written})
    card.write(run.path)
    run.publish()


def _open(
    source: str | Path, revision: str | None, report: Report, *, partial: bool = False
) -> Model:
    report(Step("open the model", 0, 1))
    model = Model.open(source, revision=revision, partial=partial)
    report(Step("open the model", 1, 1))
    return model


def _decision(choice: Choice, recipe: Recipe, given: Plan | None) -> str:
    """What was asked and what it became, in one line."""
    asked = f"budget {recipe.budget}: " if recipe.budget and given is None else ""
    rule = choice.plan.made_by.get("rule", "as given")
    grid = str(choice.grid) if choice.grid is not None else rule if given is None else "as given"
    return f"plan: {asked}{grid}, {choice.bits:.4f} bpw, {choice.nbytes:,} bytes"


def _states_bytes(work: Work, recipe: Recipe) -> int:
    """Size of the hidden states that are kept, which may have to lie on the disk."""
    width: int = work.model.config.get_text_config().hidden_size
    size = width * work.model.dtype.itemsize
    return 0 if work.batches is None else kept_tokens(recipe) * size


def _recipe(recipe: Recipe | str) -> Recipe:
    return Recipe.load(recipe) if isinstance(recipe, str) else recipe
