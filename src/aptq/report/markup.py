"""Pieces of a report as HTML: every text that comes from outside is escaped here."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib import import_module, resources
from typing import Any

Plot = dict[str, Any]  # what page/page.js draws


def esc(value: object) -> str:
    """Text for HTML, inside quotes too."""
    return html.escape(str(value), quote=True)


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table whose first column names the rows."""
    top = "".join(f'<th scope="col">{esc(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{esc(first)}</th>{"".join(f"<td>{esc(x)}</td>" for x in rest)}</tr>'
        for first, *rest in rows
    )
    said = f"<caption>{esc(caption)}</caption>" if caption else ""
    whole = f"<table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    # what scrolls has to be reachable by the keyboard
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{whole}</div>'


def folded(title: str, inside: str) -> str:
    """Something to be opened by whoever wants it."""
    return f"<details><summary>{esc(title)}</summary>{inside}</details>"


def figure(plot: Plot, title: str, says: str, data: str) -> str:
    """A plot with what it says in words, and its numbers as a table."""
    head = f"<figcaption><h3>{esc(title)}</h3><p>{esc(says)}</p></figcaption>"
    label = esc(f"{title}. {says} The numbers are in the table below.")
    place = f'<div class="plot" id="{esc(plot["id"])}" role="img" aria-label="{label}"></div>'
    return f"<figure>{head}{place}{folded('Numbers', data)}</figure>"


def card(title: str, value: str, unit: str, note: str, share: float | None = None) -> str:
    """One figure of the decision; `share` draws a bar."""
    bar = ""
    if share is not None:
        bar = f'<div class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></div>'
    head = f'<dd class="value">{esc(value)} <small>{esc(unit)}</small></dd>'
    inside = f'<dt>{esc(title)}</dt>{head}<dd class="note">{bar}{esc(note)}</dd>'
    return f'<div class="card">{inside}</div>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Terms and what they are."""
    lines = (f"<dt>{esc(term)}</dt><dd>{esc(value)}</dd>" for term, value in pairs)
    return f'<dl class="facts">{"".join(lines)}</dl>'


def numbers(plot: Plot) -> str:
    """The table of a plot of lines: a row for each x, a column for each series."""
    series = [dict(zip(one["x"], one["y"], strict=True)) for one in plot["series"]]
    rows = (
        [f"{x:.5g}", *(f"{one[x]:.4g}" if x in one else "" for one in series)]
        for x in sorted({x for one in series for x in one})
    )
    return table([plot["x"], *(one["name"] for one in plot["series"])], rows, plot["y"])


def lines(
    name: str, title: str, says: str, axes: tuple[str, str], series: list[Plot], **more: Any
) -> tuple[list[Plot], str]:
    """A plot of lines {name, x, y} with its figure; `more` goes to page/page.js as it is."""
    plot = {"id": name, "kind": "lines", "x": axes[0], "y": axes[1], "series": series, **more}
    return [plot], figure(plot, title, says, numbers(plot))


def plotly(module: str, what: str) -> Any:
    """A module of Plotly.  Raises ValueError where it is not installed, which `what` needs."""
    try:
        import_module("plotly")
        return import_module(f"plotly.{module}")
    except ImportError as error:
        raise ValueError(
            f"the {what} needs Plotly\nit is not installed, nothing was drawn\n"
            "pip install 'aptq[plotly]'"
        ) from error


def document(title: str, body: str, plots: Sequence[Plot], version: str) -> str:
    """One file that needs nothing else.  Raises ValueError where Plotly is not installed."""
    parts = resources.files("aptq.report") / "page"
    known = {
        "title": esc(title),
        "style": (parts / "page.css").read_text("utf-8"),
        "body": body,
        "version": esc(version),
        # "</script>" in a name would end the block
        "plots": json.dumps(plots, allow_nan=False).replace("<", "\\u003c"),
        "plotly": plotly("offline", "report").get_plotlyjs(),
        "script": (parts / "page.js").read_text("utf-8"),
    }
    page = (parts / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: known[found[1]], page)
