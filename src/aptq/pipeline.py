"""The steps behind the commands: measure, compress, outlook.

Compressing: check output folders and data, open the model, measure, choose the plan of every
budget, walk the blocks, publish.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from aptq.core.plan import Plan
from aptq.core.scores import Scores
from aptq.engine.data import Batches, Data, check_source, limits_of, tokens
from aptq.engine.judge import profiles_of
from aptq.engine.stream import Where
from aptq.making import make
from aptq.model.model import Model
from aptq.outlook import Outlook, look
from aptq.planner import Choice
from aptq.planning import blank, choose, kept_tokens, measuring_bytes, wants_profiles, wants_scores
from aptq.recipe import Recipe
from aptq.report import card, summary
from aptq.report.summary import Summary
from aptq.runfolder import RunFolder, budget_folder, reserve
from aptq.runtime.generate import sample
from aptq.runtime.open import find_device, original
from aptq.scoring import measure_profiles, score
from aptq.work import Report, Step, Work, silent


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
) -> Outlook:
    """All that is known before compressing `source`: sizes, needs, losses, the Pareto front.

    A folder with config.json alone is enough.  Raises ValueError and Infeasible as `compress`.
    """
    model = Model.outline(source, revision=revision)
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
) -> Scores:
    """Score every layer of `source` at every candidate of the recipe, into the new file `out`.

    Raises ValueError for anything wrong with the inputs, before any weight is read.
    """
    path, chosen, on = Path(out), _recipe(recipe), find_device(device)
    if path.exists() or not path.parent.is_dir():
        reason = "it exists" if path.exists() else "there is no such folder"
        raise ValueError(f"the scores cannot be written\n{path}: {reason}\nchoose another --out")
    _check_measure(chosen)
    check_source(chosen.data)
    model = _open(source, revision, report)
    batches = _calibration(model, chosen.data, source, revision, on, report)
    report(f"calibration: {batches}")
    work = Work(model, batches, on, activations, report=report)
    with TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        reserve(Path(folder), measuring_bytes(model, chosen, True))
        scores = score(work, chosen, Path(folder))
    scores.save(path)
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
) -> Summary:
    """Compress the model `source` into the new run folder `out`, by a recipe of one budget.

    `plan` replaces the recipe's choice of grids, `scores` its measuring; `strict` raises Unsound
    where a layer needs a rescue; `activations` says where the hidden states lie ("auto": in memory
    while they are small beside what is free, else on the disk).  Raises ValueError for anything
    wrong with the inputs, before any weight is read.
    """
    chosen, how = _recipe(recipe), (device, revision, strict, activations, report)
    (done,) = compress_each(source, out, chosen, plan, scores, *how).values()
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
) -> dict[Path, Summary]:
    """`compress` for every budget of the recipe, measured once: run folder -> summary.

    Several budgets get folders of their own below `out`.
    """
    began, on = time.perf_counter(), find_device(device)
    budgets = recipe.budgets if plan is None else (recipe.budget,)
    with ExitStack() as stack:
        stack.callback(_tidy, Path(out), Path(out).exists())
        paths = [budget_folder(Path(out), b, alone=len(budgets) == 1) for b in budgets]
        runs = [stack.enter_context(RunFolder(path, str(source))) for path in paths]
        scoring = scores is None and wants_scores(recipe, plan)
        calibrated = scoring or any(stage.reads for stage in recipe.stages)
        if calibrated:
            check_source(recipe.data)
        model = _open(source, revision, report)
        _rehearse(model, recipe, plan, scores)
        batches = None
        if calibrated:
            batches = _calibration(model, recipe.data, source, revision, on, report)
        report(f"calibration: {batches or 'none of the stages needs data'}")
        work = Work(model, batches, on, activations, strict, report)
        scores = _measured(work, recipe, scores, scoring, runs[0])
        done = {}
        for budget, run in zip(budgets, runs, strict=True):
            single = replace(recipe, budget=budget)
            done[run.out] = _run(run, work, single, plan, scores, began)
            began = time.perf_counter()  # measuring counts for the first
    return done


def _rehearse(model: Model, recipe: Recipe, plan: Plan | None, scores: Scores | None) -> None:
    """Raise what the choice of a plan will raise, before anything is measured."""
    if scores is None and wants_scores(recipe, plan):
        _check_measure(recipe)
        scores = blank(model, recipe)
    for budget in recipe.budgets:
        choose(model, replace(recipe, budget=budget), plan, scores)


def _measured(
    work: Work, recipe: Recipe, scores: Scores | None, scoring: bool, run: RunFolder
) -> Scores | None:
    """Scores where they are wanted; profiles in `work` where a stage weights rows by them."""
    missing = wants_profiles(recipe) and profiles_of(scores) is None
    if work.batches is not None and (scoring or missing):
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
) -> Summary:
    """Choose the plan of one budget, compress by it, publish."""
    choice = choose(work.model, recipe, plan, scores)
    work.report(_decision(choice, recipe, plan))
    run.reserve(choice.nbytes + _states_bytes(work, recipe))
    written = make(run, work, recipe, choice, scores)
    seconds = round(time.perf_counter() - began, 3)
    run.log("done", {"seconds": seconds, "bytes_after": written})
    card.write(run.path)
    run.publish()
    return summary.read(run.out)


def _check_measure(recipe: Recipe) -> None:
    if recipe.measure is None:
        raise ValueError(
            "there is nothing to choose by\nthe recipe has no [measure] table\n"
            "add one with use = 'fisher', say, or give --scores FILE"
        )
    recipe.measure.check(["outer = true"] if recipe.outer else [], recipe.stages)


def _open(source: str | Path, revision: str | None, report: Report) -> Model:
    report(Step("open the model", 0, 1))
    model = Model.open(source, revision=revision)
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


def _calibration(
    model: Model,
    data: Data,
    source: str | Path,
    revision: str | None,
    device: torch.device,
    report: Report,
) -> Batches:
    """Calibration windows; where the model writes some the whole original is loaded for it."""

    def sampler(samples: int, length: int, seed: int, starts: Tensor | None) -> Tensor:
        writer = original(source, device, revision=revision)
        bos = writer.tokenizer.bos_token_id

        def show(done: int, total: int) -> None:
            report(Step("write windows", done, total))

        return sample(writer.model, samples, length, seed, bos=bos, starts=starts, report=show)

    return tokens(data, model.tokenizer, limits=limits_of(model.config), sampler=sampler)
