"""The commands that look at models and at the package: eval, generate, info, list."""

from pathlib import Path
from typing import Annotated

import typer

from aptq.cli.common import Debug, Device, Json, Revision, Source, guard, print_json


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
    with guard(debug):
        from aptq.assessing import assess
        from aptq.engine.data import Data
        from aptq.terminal import Display, quiet_libraries, show_evaluation

        quiet_libraries()
        with Display(quiet=as_json) as display:
            result = assess(
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
            print_json(result)
        else:
            show_evaluation(result)


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
    with guard(debug):
        from aptq.runtime.generate import write
        from aptq.runtime.open import find_device, open_any
        from aptq.terminal import quiet_libraries

        quiet_libraries()
        ready = open_any(model, find_device(device), revision=revision)
        pieces = write(*ready, prompt, tokens, chat=not raw, temperature=temperature, seed=seed)
        if as_json:
            print_json({"model": model, "prompt": prompt, "text": "".join(pieces)})
            return
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()


def info(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint")],
    layers: Annotated[bool, typer.Option("--layers", help="One line for each layer")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all and check the hashes")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What is in a run or checkpoint: bits, bytes and error of its layers."""
    with guard(debug):
        from aptq.contents import contents
        from aptq.terminal import show_contents

        found = contents(run, verify=verify)
        if as_json:
            print_json(found.to_json())
        else:
            show_contents(found, layers=layers)


def list_methods(
    name: Annotated[str | None, typer.Argument(help="Show this method only")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The methods and their options, and the shipped recipes."""
    with guard(debug):
        from aptq.contents import catalogue
        from aptq.recipe import shipped_names
        from aptq.terminal import show_catalogue

        entries, recipes = catalogue(name), shipped_names()
        if as_json:
            print_json({"methods": [entry.to_json() for entry in entries], "recipes": recipes})
        else:
            show_catalogue(entries, recipes, markdown=markdown)
