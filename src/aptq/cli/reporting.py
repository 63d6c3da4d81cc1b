"""The command that draws: report."""

from pathlib import Path
from typing import Annotated

import typer

from aptq.cli.common import Debug, Json, guard, print_json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders")],
    compare: Annotated[bool, typer.Option("--compare", help="All runs on one page")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File (default: report.html in the run, or compare.html)")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file for each RUN, or one that compares them; it needs no network."""
    with guard(debug):
        from aptq.report import compare as comparison
        from aptq.report import page

        if out is not None and len(runs) > 1 and not compare:
            raise ValueError(
                f"one file cannot hold {len(runs)} reports\n--out {out}\n"
                "leave out --out, or compare the runs with --compare"
            )
        if compare:
            made = [comparison.write(runs, out or Path("compare.html"))]
        else:
            made = [page.write(run, out) for run in runs]
        if as_json:
            print_json({"out": [str(path) for path in made]})
        else:
            typer.echo("\n".join(f"written to {path}" for path in made))
