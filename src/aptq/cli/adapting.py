"""`aptq adapt`: factors for a task beside the codes of a finished run."""

from pathlib import Path
from typing import Annotated

import typer

from aptq.cli import common
from aptq.cli.common import guard, print_json


def adapt(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run or checkpoint folder")],
    model: common.Original,
    out: Annotated[Path, typer.Option(help="New folder of the adapter")],
    data: Annotated[str, typer.Option(help="Text of the task: file, hub:NAME or builtin:pydoc")],
    rank: Annotated[int, typer.Option(help="Rank of every layer's factors")] = 32,
    grid: Annotated[str, typer.Option(help="Grid of the factors; 16 bits without one")] = "",
    samples: Annotated[int, typer.Option(help="Windows of the text")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in a window")] = 512,
    device: common.Device = "auto",
    revision: common.Revision = None,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Write an adapter for one task: factors beside the codes of RUN, made of MODEL."""
    with guard(debug):
        from aptq.adapting import adapt as make
        from aptq.engine.data import Data
        from aptq.terminal import Display, quiet_libraries

        quiet_libraries()
        text = Data(source=data, samples=samples, length=length)
        with Display(quiet=as_json) as display:
            made = make(
                folder,
                model,
                out,
                rank=rank,
                grid=grid,
                data=text,
                device=device,
                revision=revision,
                report=display,
            )
        size = sum(file.stat().st_size for file in made.iterdir())
        if as_json:
            print_json({"out": str(made), "nbytes": size})
        else:
            typer.echo(f"written to {made} ({size:,} bytes)")
