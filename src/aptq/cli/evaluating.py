"""The commands that measure models: eval and compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aptq.cli.common import Debug, Device, Json, Quiet, Revision, Source, guard, print_json

if TYPE_CHECKING:
    from aptq.assessing import Exam

Reference = Annotated[
    str | None, typer.Option("--reference", "--against", help="The original, to compare with")
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text", "--data", help="File, hub:NAME or builtin:pydoc (its end; default); repeatable"
    ),
]
Windows = Annotated[int | None, typer.Option(help="Windows of a text (default: all of it)")]
Length = Annotated[int, typer.Option(help="Tokens in a window")]
Tasks = Annotated[
    str, typer.Option(help="With commas: tasks of lm-eval, .jsonl of {question, choices, label}")
]
Limit = Annotated[int | None, typer.Option(help="Items of each task (default: all)")]
HEADS = ("perplexity", "NLL - base", "KL")
Seed = Annotated[int, typer.Option(help="Of the items and of the bootstrap")]


def evaluate(
    model: Source,
    reference: Reference = None,
    text: Texts = None,
    windows: Windows = None,
    length: Length = 2048,
    tasks: Tasks = "",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity and tasks of MODEL, and how far it is from a reference, on the same tokens."""
    with guard(debug):
        from aptq.assessing import assess
        from aptq.terminal import Display, quiet_libraries, show_evaluation

        exam = _exam(text, windows, length, tasks, limit, seed)
        quiet_libraries()
        with Display(quiet=as_json or quiet) as display:
            result = assess(
                model,
                reference=reference,
                exam=exam,
                device=device,
                revision=revision,
                report=display,
            )
        if as_json:
            print_json(result)
        elif not quiet:
            show_evaluation(result)
            for line in (*_intervals(result), *_task_lines(result["tasks"])):
                typer.echo(line)


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Run or model folders, .gguf files")
    ],
    reference: Reference = None,
    text: Texts = None,
    windows: Windows = None,
    length: Length = 2048,
    tasks: Tasks = "",
    limit: Limit = None,
    seed: Seed = 0,
    html: Annotated[Path | None, typer.Option(help="Draw size against quality here")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Size, perplexity, divergence and tasks of several models, measured on the same tokens."""
    with guard(debug):
        from aptq import comparing
        from aptq.report.markup import plotly
        from aptq.terminal import Display, quiet_libraries

        exam = _exam(text, windows, length, tasks, limit, seed)
        if html is not None:
            plotly("graph_objects", "picture")  # before the long work, not after it
        quiet_libraries()
        with Display(quiet=as_json or quiet) as display:
            found = comparing.compare(
                models, exam, reference=reference, device=device, report=display
            )
        values = found.to_json()
        if html is not None:
            comparing.write_html(html, values, found.measure)
        if as_json:
            print_json(values)
        elif not quiet:
            _show(values)


def _exam(
    texts: Sequence[str] | None,
    windows: int | None,
    window: int,
    tasks: str,
    limit: int | None,
    seed: int,
) -> "Exam":
    """What is asked, from the options; unreadable texts are refused before a model is loaded."""
    from aptq.assessing import Exam
    from aptq.engine.data import Data

    return Exam(
        texts=tuple(Data(source=text) for text in texts or ["builtin:pydoc"]),
        windows=windows,
        window=window,
        tasks=tuple(name for name in tasks.split(",") if name),
        limit=limit,
        seed=seed,
    )


def _pm(value: float | None, ends: Sequence[float] | None, form: str = ".3f") -> str:
    """A figure with half the width of its interval."""
    if value is None:
        return ""
    return f"{value:{form}}" + ("" if ends is None else f" ± {(ends[1] - ends[0]) / 2:{form}}")


def _intervals(result: Mapping[str, Any]) -> list[str]:
    """The figures with their intervals, over all texts and by text and position."""
    lines = []
    for part in (result, *result["texts"]):
        line = f"{part['text']}: perplexity {_pm(part['perplexity'], part['perplexity_interval'])}"
        if part["kl"] is not None:
            line += f", KL {_pm(part['kl'], part['kl_interval'], '.4f')}"
            line += f", NLL moved by {_pm(part['difference'], part['difference_interval'], '.4f')}"
        lines.append(line)
    bins = ", ".join(f"{one['first']}: {one['perplexity']:.4g}" for one in result["positions"])
    return [*lines, f"perplexity by tokens seen: {bins}", "(± is half of a 95 % interval)"]


def _task_lines(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for one in tasks:
        error = "" if one["stderr"] is None else f" ± {one['stderr']:.4f} (standard error)"
        line = f"{one['task']} {one['metric']}: {one['value']:.4f}{error}, {one['items']} items"
        other = one["against"]
        if other is not None:
            line += f"; {other['difference']:+.4f} ± {other['stderr']:.4f} from the original, "
            line += f"p = {other['p']:.3g} ({other['test']})"
        lines.append(line)
    return lines


def _show(found: Mapping[str, Any]) -> None:
    """The table of a comparison; cells wrap where the terminal is narrow, and none is left out."""
    from rich.console import Console
    from rich.table import Table

    from aptq.terminal import size

    title = f"{found['text']}, windows of {found['window']} tokens; base: {found['base']}"
    table = Table(title=title, title_justify="left", box=None)
    tasks = [f"{one['task']} {one['metric']}" for one in found["models"][0]["tasks"]]
    for head in ("model", "format", "size", "bpw", "tokens/s", *HEADS, *tasks):
        table.add_column(head, justify="left" if head == "model" else "right", overflow="fold")
    for one in found["models"]:
        cells = [one["format"], size(one["bytes"]), f"{one['bpw']:.4f}", f"{one['decode']:.1f}"]
        for key, form in (("perplexity", ".3f"), ("difference", ".4f"), ("kl", ".4f")):
            cells.append(_pm(one[key], one[f"{key}_interval"], form))
        scores = [_pm(x["value"], x["stderr"] and (0, 2 * x["stderr"])) for x in one["tasks"]]
        table.add_row(one["model"], *cells, *scores)
    Console().print(table)
    typer.echo("± is half of a 95 % interval, of tasks the standard error")
    typer.echo(f"no other is smaller and better: {', '.join(found['front'])}")
