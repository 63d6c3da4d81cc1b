"""The Pareto front of a plan, size against expected loss: as characters and as an HTML file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aptq.report.markup import plotly

WIDTH, HEIGHT = 60, 14  # characters


def picture(
    points: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]] = ()
) -> str:
    """Points (x, y) as dots and `marks` as rings, y on a logarithmic scale where it is above 0."""
    shown = [(x, math.log10(y)) for x, y in points if y > 0]
    rings = [(x, math.log10(y)) for x, y in marks if y > 0]
    if len(shown) < 2:
        return ""
    left, right = min(x for x, _ in shown + rings), max(x for x, _ in shown + rings)
    low, high = min(y for _, y in shown + rings), max(y for _, y in shown + rings)
    canvas = [[" "] * WIDTH for _ in range(HEIGHT)]
    for sign, some in (("•", shown), ("O", rings)):
        for x, y in some:
            column = round((x - left) / ((right - left) or 1) * (WIDTH - 1))
            row = round((high - y) / ((high - low) or 1) * (HEIGHT - 1))
            canvas[row][column] = sign
    label = {0: f"{10**high:.2g}", HEIGHT - 1: f"{10**low:.2g}"}
    lines = [f"{label.get(row, ''):>8} |{''.join(line)}" for row, line in enumerate(canvas)]
    axis = f"{left:.4g}{f'{right:.4g}':>{WIDTH - len(f'{left:.4g}')}}"
    return "\n".join([*lines, " " * 9 + "+" + "-" * WIDTH, " " * 10 + axis])


def write_html(path: Path, outlook: Mapping[str, Any]) -> None:
    """Write one self-contained file that shows the front of `outlook` (Outlook.to_json()).

    Raises ValueError where Plotly is not installed.
    """
    front, unit = outlook["front"], outlook["unit"]
    figure = plotly("graph_objects", "picture").Figure()
    figure.add_scatter(
        x=[point["bits"] for point in front],
        y=[point["loss"] for point in front],
        error_y={"type": "data", "array": [point["noise"] for point in front]},
        text=[f"{point['nbytes']:,} bytes" for point in front],
        mode="lines+markers",
        name="best known for its size",
    )
    chosen = [line for line in outlook["budgets"] if line["loss"] is not None]
    figure.add_scatter(
        x=[line["bits"] for line in chosen],
        y=[line["loss"] for line in chosen],
        text=[line["budget"] for line in chosen],
        mode="markers",
        marker={"size": 12, "symbol": "circle-open"},
        name="budgets",
    )
    figure.update_layout(
        title=outlook["model"],
        xaxis_title="bits per weight, everything counted",
        yaxis_title=unit,
        yaxis_type="log",
    )
    figure.write_html(path, include_plotlyjs=True)
