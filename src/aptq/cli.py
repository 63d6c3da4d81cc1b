"""The command `aptq`.  Options become a recipe; the work is in pipeline.py.

Exit codes: 1 defect of the program, 2 bad input, 3 no plan fits, 4 memory or disk, 5 a rescue
under --strict, 6 damaged checkpoint, 130 interrupted.  An error is three lines, without traceback.
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

# torch and transformers are imported inside the commands, so that `aptq --help` answers at once.
from aptq import __version__, failures

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FULL = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)

Original = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or .gguf file")]
Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file or compressed run")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id")]
Activations = Annotated[
    Literal["auto", "memory", "disk"], typer.Option(help="Where hidden states lie")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aptq {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compress language models to a budget, run them, and measure what it cost."""


@app.command()
def compress(
    model: Original,
    out: Annotated[Path, typer.Option(help="New run folder")],
    grid: Annotated[str | None, typer.Option(help="Grid of all layers, such as int4-g64-z")] = None,
    budget: Annotated[str | None, typer.Option(help="4bpw, 110MB or 4.2GiB")] = None,
    recipe: Annotated[str, typer.Option(help="Shipped recipe or .toml file")] = "best",
    plan: Annotated[Path | None, typer.Option(help="plan.json to repeat")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Leave layers of this name pattern as they are")
    ] = None,
    data: Annotated[str | None, typer.Option(help="File, hub:NAME, builtin:pydoc or self")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window")] = None,
    seed: Annotated[int | None, typer.Option(help="0 takes the first windows")] = None,
    device: Device = "auto",
    revision: Revision = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop where a layer needs a numerical rescue")
    ] = False,
    activations: Activations = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into a run folder: recipe, plan, log, model card and packed checkpoint."""
    with _guard(debug):
        _one_size(grid, budget, plan, keep, recipe)
        from aptq import pipeline
        from aptq.core.plan import Plan
        from aptq.recipe import Recipe
        from aptq.terminal import Display, quiet_libraries, show_summary

        quiet_libraries()
        chosen = Recipe.load(recipe).adapt(
            grid=grid,
            budget=budget,
            keep=tuple(keep or ()),
            source=data,
            samples=samples,
            length=length,
            seed=seed,
        )
        with Display(quiet=as_json) as display:
            done = pipeline.compress(
                model,
                out,
                recipe=chosen,
                plan=None if plan is None else Plan.load(plan),
                device=device,
                revision=revision,
                strict=strict,
                activations=activations,
                report=display,
            )
        if as_json:
            _print_json({"out": str(out), **done.to_json()})
        else:
            show_summary(done)
            typer.echo(f"written to {out}")


@app.command("eval")
def evaluate(
    model: Source,
    reference: Annotated[str | None, typer.Option(help="The original, to compare with")] = None,
    data: Annotated[
        str, typer.Option(help="File, hub:NAME or builtin:pydoc (its end)")
    ] = "builtin:pydoc",
    windows: Annotated[int | None, typer.Option(help="Windows (default: all of the text)")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window")] = 2048,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL, and its divergence from a reference, on the same tokens."""
    with _guard(debug):
        from aptq import pipeline
        from aptq.engine.data import Data
        from aptq.terminal import Display, quiet_libraries, show_evaluation

        quiet_libraries()
        with Display(quiet=as_json) as display:
            result = pipeline.assess(
                model,
                reference=reference,
                data=Data(source=data),
                windows=windows,
                window=length,
                device=device,
                revision=revision,
                report=display,
            )
        if as_json:
            _print_json(result)
        else:
            show_evaluation(result)


@app.command()
def generate(
    model: Source,
    prompt: Annotated[str, typer.Argument(help="Text to continue or to answer")],
    tokens: Annotated[int, typer.Option(help="Most tokens to write")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Leave out the chat template")] = False,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let MODEL continue PROMPT, or answer it where the model has a chat template."""
    with _guard(debug):
        from aptq.runtime.generate import write
        from aptq.runtime.open import find_device, open_any
        from aptq.terminal import quiet_libraries

        quiet_libraries()
        ready = open_any(model, find_device(device), revision=revision)
        pieces = write(*ready, prompt, tokens, chat=not raw, temperature=temperature, seed=seed)
        if as_json:
            _print_json({"model": model, "prompt": prompt, "text": "".join(pieces)})
            return
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


@app.command()
def info(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint")],
    layers: Annotated[bool, typer.Option("--layers", help="One line for each layer")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all and check the hashes")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What is in a run or checkpoint: bits, bytes and error of its layers."""
    with _guard(debug):
        from aptq.contents import contents
        from aptq.terminal import show_contents

        found = contents(run, verify=verify)
        if as_json:
            _print_json(found.to_json())
        else:
            show_contents(found, layers=layers)


@app.command("list")
def list_methods(
    name: Annotated[str | None, typer.Argument(help="Show this method only")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The methods and their options, and the shipped recipes."""
    with _guard(debug):
        from aptq.contents import catalogue
        from aptq.recipe import shipped_names
        from aptq.terminal import show_catalogue

        entries, recipes = catalogue(name), shipped_names()
        if as_json:
            _print_json({"methods": [entry.to_json() for entry in entries], "recipes": recipes})
        else:
            show_catalogue(entries, recipes, markdown=markdown)


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


def _print_json(value: object) -> None:
    """One strict JSON value: what is not finite becomes null."""
    finite = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    typer.echo(json.dumps(finite, indent=1))


@contextmanager
def _guard(debug: bool) -> Iterator[None]:
    """Every exception of a command becomes a short message and its exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        code = exit_code(error)
        text = str(error) or type(error).__name__
        if code == 1:
            text = (
                f"unexpected {type(error).__name__}: {text.splitlines()[0]}\n{_place(error)}\n"
                "this is a defect of the program: run again with --debug and report the traceback"
            )
        typer.echo("interrupted" if code == 130 else f"error: {text}", err=True)
        raise typer.Exit(code) from error


def exit_code(error: BaseException) -> int:
    """The exit code for an exception, as in the header of this file."""
    if isinstance(error, OSError):
        return 4 if error.errno in FULL else 2
    if type(error).__name__ == "OutOfMemoryError":
        return 4  # torch's class, by name: it may not be imported yet
    table: tuple[tuple[type[BaseException], int], ...] = (
        (failures.Infeasible, 3),
        (failures.Shortage, 4),
        (MemoryError, 4),
        (failures.Unsound, 5),
        (failures.Corrupt, 6),
        (ValueError, 2),  # the base of those above, hence after them
        (KeyboardInterrupt, 130),
    )
    return next((code for kind, code in table if isinstance(error, kind)), 1)


def _place(error: BaseException) -> str:
    """File and line where `error` was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "nowhere"


def main() -> None:
    """Run the command line of this process."""
    # OpenMP's threads spin while they wait; on a busy machine they then starve each other (161 s
    # instead of 39 s measured).  Read when torch is loaded, so it has to be said before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="aptq" if Path(sys.argv[0]).name == "__main__.py" else None)
