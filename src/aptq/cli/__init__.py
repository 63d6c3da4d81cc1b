"""The command `aptq`.  Options become a recipe; the work is in pipeline.py.

torch and transformers are imported inside the commands, so that `aptq --help` answers at once.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from aptq import __version__
from aptq.cli.adapting import adapt
from aptq.cli.benching import bench
from aptq.cli.common import exit_code
from aptq.cli.compressing import compress, export, measure, plan
from aptq.cli.evaluating import compare, evaluate
from aptq.cli.looking import generate, info, list_methods, verify
from aptq.cli.reporting import report

__all__ = ["app", "exit_code", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(compress)
app.command()(measure)
app.command()(plan)
app.command()(export)
app.command()(adapt)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(generate)
app.command()(info)
app.command()(verify)
app.command()(report)
app.command("list")(list_methods)
app.add_typer(bench, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aptq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compress language models to a budget, run them, and measure what it cost."""


def main() -> None:
    """Run the command line of this process."""
    # OpenMP's threads spin while they wait: on a busy machine they then starve each other (161 s
    # instead of 39 s measured), and where they sleep at once they have to be woken for each of the
    # hundreds of products of a token (28 instead of 40 tokens/s).  A thousand turns are some 20
    # microseconds.  Read when torch is loaded, so it has to be said before.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # whole GPUs are planned for ("fits"): an eighth of one was lost to holes between fixed segments
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        app(prog_name="aptq" if Path(sys.argv[0]).name == "__main__.py" else None)
    finally:  # an impatient Ctrl-C while Python shuts down must not replace the exit code
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
