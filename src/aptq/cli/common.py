"""What the commands share: options, one way to end with an error, exit codes.

Exit codes: 1 defect of the program, 2 bad input, 3 no plan fits, 4 memory or disk, 5 a rescue
under --strict, 6 damaged checkpoint, 75 stopped and to be resumed, 130 interrupted at once.  An
error is three lines, without traceback.
"""

import json
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from aptq import failures
from aptq.versions import check_versions

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
Resume = Annotated[
    Literal["auto", "never", "required"],
    typer.Option(help="Go on with what an interrupted run has left below OUT.partial"),
]
Partial = Annotated[
    bool, typer.Option("--allow-partial", help="Keep weights that are in no known linear")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors")]
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
        check_versions()
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
        # names out of hostile files may hold what a terminal would obey
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        typer.echo({75: text, 130: "interrupted"}.get(code, f"error: {text}"), err=True)
        raise typer.Exit(code) from error


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; the second one stops at once, by KeyboardInterrupt."""
    asked: list[int] = []

    def handle(number: int, _frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        typer.echo("stopping after this block; once more stops at once", err=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(error: BaseException) -> int:
    """The exit code for an exception, as in the header of this file."""
    if failures.scarce(error) is not None:
        return 4
    table: tuple[tuple[type[BaseException], int], ...] = (
        (OSError, 2),
        (failures.Stopped, 75),
        (failures.Infeasible, 3),
        (failures.Shortage, 4),
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
