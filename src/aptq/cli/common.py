"""What the commands share: options, one way to end with an error, exit codes.

Exit codes: 1 defect of the program, 2 bad input, 3 no plan fits, 4 memory or disk, 5 a rescue
under --strict, 6 damaged checkpoint, 130 interrupted.  An error is three lines, without traceback.
"""

import errno
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from aptq import failures

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
Budget = Annotated[
    str | None,
    typer.Option(help="4bpw, 110MB, 4.2GiB or 'fits 8GiB @ 8192x1'; several with commas"),
]
GridName = Annotated[str | None, typer.Option(help="Grid of all layers, such as int4-g64-z")]
RecipeName = Annotated[str, typer.Option(help="Shipped recipe or .toml file")]
Keep = Annotated[
    list[str] | None, typer.Option(help="Leave layers of this name pattern as they are")
]
Profile = Annotated[
    Literal["aptq", "transformers", "gguf", "vllm"] | None,
    typer.Option(help="Engine that shall run it: which layers must share a grid"),
]
ScoresFile = Annotated[Path | None, typer.Option(help="scores.json instead of measuring")]
Text = Annotated[str | None, typer.Option(help="File, hub:NAME, builtin:pydoc or self")]
Samples = Annotated[int | None, typer.Option(help="Calibration windows")]
Length = Annotated[int | None, typer.Option(help="Tokens in a window")]
Seed = Annotated[int | None, typer.Option(help="0 takes the first windows")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]

DEFAULT = "aptq"  # the shipped recipe that commands take


def print_json(value: object) -> None:
    """One strict JSON value: what is not finite becomes null."""
    finite = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    typer.echo(json.dumps(finite, indent=1))


@contextmanager
def guard(debug: bool) -> Iterator[None]:
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
