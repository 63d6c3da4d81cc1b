"""The commands that look at models and at the package: generate, info, verify, list."""

from pathlib import Path
from typing import Annotated

import typer

from aptq.cli.common import Debug, Device, Json, Revision, Source, guard, print_json


def generate(
    model: Source,
    prompt: Annotated[str, typer.Argument(help="Text to continue or to answer")],
    tokens: Annotated[int, typer.Option(help="Most tokens to write")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the steps: GPU, slow to begin")
    ] = False,
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
        pieces = write(
            *ready,
            prompt,
            tokens,
            chat=not raw,
            temperature=temperature,
            seed=seed,
            compiled=compiled,
        )
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


def verify(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read all of a checkpoint: hashes, schema, shapes, codes, scales; exit code 6 on damage."""
    info(run, layers=False, verify=True, as_json=as_json, debug=debug)


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
