"""The commands that choose and make: compress, measure, plan, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from aptq.cli import common
from aptq.cli.common import guard, print_json


def compress(
    model: common.Original,
    out: Annotated[Path, typer.Option(help="New run folder; of several budgets one in it each")],
    grid: common.GridName = None,
    budget: common.Budget = None,
    recipe: common.RecipeName = common.DEFAULT,
    plan: Annotated[Path | None, typer.Option(help="plan.json to repeat")] = None,
    scores: common.ScoresFile = None,
    keep: common.Keep = None,
    profile: common.Profile = None,
    data: common.Text = None,
    samples: common.Samples = None,
    length: common.Length = None,
    seed: common.Seed = None,
    device: common.Device = "auto",
    revision: common.Revision = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop where a layer needs a numerical rescue")
    ] = False,
    activations: common.Activations = "auto",
    nonfinite: Annotated[
        Literal["refuse", "keep"],
        typer.Option("--allow-nonfinite", help="keep leaves matrices with NaN or Inf as they are"),
    ] = "refuse",
    partial: common.Partial = False,
    resume: common.Resume = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Know the source by SHA-256, not by size and time")
    ] = False,
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Compress MODEL into a run folder: recipe, scores, plan, log, card and packed checkpoint."""
    with guard(debug):
        _one_size(grid, budget, plan, keep, recipe)
        from aptq import pipeline
        from aptq.core.plan import Plan
        from aptq.core.scores import Scores
        from aptq.preflight import Allow
        from aptq.recipe import Recipe
        from aptq.terminal import Display, quiet_libraries, show_summary

        quiet_libraries()
        chosen = Recipe.load(recipe).adapt(
            grid=grid,
            budget=budget,
            keep=tuple(keep or ()),
            profile=profile,
            source=data,
            samples=samples,
            length=length,
            seed=seed,
        )
        with Display(quiet=as_json or quiet) as display, common.interruptible() as stop:
            given = None if plan is None else Plan.load(plan)
            table = None if scores is None else Scores.load(scores)
            allow = Allow(nonfinite=nonfinite == "keep", partial=partial)
            how = (device, revision, strict, activations, display, allow, resume, verify, stop)
            made = pipeline.compress_each(model, out, chosen, given, table, *how)
        for folder, done in made.items():
            if not (as_json or quiet):
                show_summary(done)
                typer.echo(f"written to {folder}")
        if as_json:
            found = [{"out": str(folder), **done.to_json()} for folder, done in made.items()]
            print_json(found if len(found) > 1 else found[0])


def measure(
    model: common.Original,
    out: Annotated[Path, typer.Option(help="New file, scores.json")],
    recipe: common.RecipeName = common.DEFAULT,
    keep: common.Keep = None,
    data: common.Text = None,
    samples: common.Samples = None,
    length: common.Length = None,
    seed: common.Seed = None,
    device: common.Device = "auto",
    revision: common.Revision = None,
    activations: common.Activations = "auto",
    partial: common.Partial = False,
    resume: common.Resume = "auto",
    quiet: common.Quiet = False,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Measure how much every layer of MODEL would suffer at every candidate grid."""
    with guard(debug):
        from aptq import pipeline
        from aptq.preflight import Allow
        from aptq.recipe import Recipe
        from aptq.terminal import Display, quiet_libraries, show_scores

        quiet_libraries()
        chosen = Recipe.load(recipe).adapt(
            keep=tuple(keep or ()), source=data, samples=samples, length=length, seed=seed
        )
        with Display(quiet=as_json or quiet) as display, common.interruptible() as stop:
            scores = pipeline.measure(
                model,
                out,
                recipe=chosen,
                device=device,
                revision=revision,
                activations=activations,
                report=display,
                allow=Allow(partial=partial),
                resume=resume,
                stop=stop,
            )
        if as_json:
            print_json({"out": str(out), "measure": scores.measure, "unit": scores.unit})
        elif not quiet:
            show_scores(scores)
            typer.echo(f"written to {out}")


def plan(
    model: common.Original,
    grid: common.GridName = None,
    budget: common.Budget = None,
    recipe: common.RecipeName = common.DEFAULT,
    scores: common.ScoresFile = None,
    keep: common.Keep = None,
    profile: common.Profile = None,
    context: Annotated[int, typer.Option(help="Tokens that it shall hold when it runs")] = 8192,
    out: Annotated[Path | None, typer.Option(help="Write plan.json, of one budget")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the picture as an HTML file")] = None,
    partial: common.Partial = False,
    device: common.Device = "auto",
    revision: common.Revision = None,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """What compressing MODEL would give and take, from its config and headers alone."""
    with guard(debug):
        from aptq import pipeline
        from aptq.core.scores import Scores
        from aptq.preflight import Allow
        from aptq.recipe import Recipe
        from aptq.report import front
        from aptq.terminal import quiet_libraries, show_outlook

        quiet_libraries()
        chosen = Recipe.load(recipe).adapt(
            grid=grid, budget=budget, keep=tuple(keep or ()), profile=profile
        )
        found = pipeline.outlook(
            model,
            chosen,
            scores=None if scores is None else Scores.load(scores),
            context=context,
            device=device,
            revision=revision,
            allow=Allow(partial=partial),
        )
        if out is not None:
            found.single().choice.plan.save(out)
        if html is not None:
            front.write_html(html, found.to_json())
        if as_json:
            print_json(found.to_json())
        else:
            show_outlook(found)


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run or checkpoint folder")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gguf or gptq")],
    out: Annotated[Path, typer.Option(help="New folder; for gguf a new file")],
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the format")
    ] = None,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Write a compressed RUN in the format of another engine: vLLM, llama.cpp, transformers."""
    with guard(debug):
        from aptq.exporting import export_to
        from aptq.options import parse_pairs
        from aptq.terminal import Display, quiet_libraries

        quiet_libraries()
        with Display(quiet=as_json) as display:
            made = export_to(folder, out, to=to, options=parse_pairs(options or ()), report=display)
        size = sum(file.stat().st_size for file in [made, *made.rglob("*")] if file.is_file())
        if as_json:
            print_json({"out": str(made), "to": to, "nbytes": size})
        else:
            typer.echo(f"written to {made} ({size:,} bytes)")


def _one_size(
    grid: str | None, budget: str | None, plan: Path | None, keep: list[str] | None, recipe: str
) -> None:
    """A size has to come from somewhere, and from one place."""
    if plan is not None and (grid is not None or budget is not None or keep):
        raise ValueError(
            "a plan leaves nothing to choose\n--plan was given with --grid, --budget or --keep\n"
            "give the plan alone, or leave it out"
        )
    if (grid, budget, plan) == (None, None, None) and not recipe.endswith(".toml"):
        raise ValueError(
            f"how small the model shall become is not said\nrecipe {recipe!r} fits any size\n"
            "add --grid int4-g64-z, --budget 4bpw or --plan FILE"
        )
