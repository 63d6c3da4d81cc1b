"""Draw the figures of docs/results.md from benchmarks/results/*.json; nothing is measured here.

usage: python figures.py [--check | --shares]
--shares: perplexity of joint plans over the least of other rows drawn that take no more bytes.
Bytes of an SVG depend on the version of matplotlib: docs/figures is of the one in constraints.txt.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
FIGURES = common.REPOSITORY / "docs" / "figures"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "aptq", "font.size": 9, "axes.axisbelow": True}
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}
MB = (27, 30, 35, 40, 50, 60, 80)
BITS = (2, 2.5, 3, 3.5, 4, 5, 6)
PERPLEXITY = (20, 25, 30, 40, 60, 100, 200)
SAME = 1.0001  # sizes that differ by less are one size


@dataclass(frozen=True)
class Series:
    """Rows that are drawn alike, in lines that each begin at a grid alone."""

    name: str
    color: str  # of Okabe and Ito: told apart by everyone
    marker: str
    lines: tuple[str, ...]  # a pattern of labels for each line
    style: str = "-"

    def found(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows of each line by their bytes."""
        for pattern in self.lines:
            own = [row for row in rows if re.search(pattern, row["label"])]
            if len(own) < 2:
                raise SystemExit(f"{self.name}: {len(own)} rows match {pattern!r}; 2 make a line")
            yield sorted(own, key=lambda row: row["linear_bytes"])


def beside(grid: str, more: str) -> str:
    """Labels of a grid alone and with `more` beside it."""
    return rf"^{grid}-z( by gptq|\+{more})$"


JOINT = Series("all chosen together", "#000000", "o", (r"^joint [\d.]+$",))
SERIES = (
    Series("one grid", "#777777", "s", (r"^int[23]-(row|g64)-z by gptq$",), ""),
    Series("bits only, chosen by layer", "#0072b2", "v", ("^bits (alone|of) ",)),
    Series(
        "int3-g64 + rank 16 to 64", "#e69f00", "^", (beside("int3-g64", r"r\d+ by eora"),), "--"
    ),
    Series(
        "the same, factors in int8",
        "#d55e00",
        ">",
        (beside("int3-g64", r"r\d+@int8-row by eora"),),
        "--",
    ),
    Series(
        "one grid + outliers, 0.25 to 1 %",
        "#009e73",
        "D",
        tuple(beside(g, r"o[\d.]+% by spqr") for g in ("int2-row", "int3-row", "int3-g64")),
        "--",
    ),
    JOINT,
)


def result(name: str) -> list[Row]:
    """Rows of a committed result file."""
    text = (common.RESULTS / f"{name}.json").read_text(encoding="utf-8")
    rows: list[Row] = json.loads(text)["rows"]
    return rows


def shares(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Joint plan, text -> its perplexity over the best of others drawn that take no more bytes."""
    joint = next(JOINT.found(rows))
    others = [row for series in SERIES[:-1] for line in series.found(rows) for row in line]
    found: dict[str, dict[str, float]] = {}
    for row in joint:
        limit = SAME * row["linear_bytes"]
        fair = [other for other in others if other["linear_bytes"] <= limit]
        best = {key: min(other[key] for other in fair) for key in TEXTS}
        found[row["label"]] = {name: row[key] / best[key] for key, name in TEXTS.items()}
    return found


def parts(figure: Figure) -> None:
    """Perplexity by bytes: bits, factors and outliers, each alone and all together."""
    rows = result("parts-cuda")
    whole = next(row for row in result("quality-cuda") if row["label"] == "bf16")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, text) in zip(panels, TEXTS.items(), strict=True):
        for series in SERIES:
            for number, line in enumerate(series.found(rows)):
                axes.plot(
                    [row["linear_bytes"] / 1e6 for row in line],
                    [row[key] for row in line],
                    linestyle=series.style,
                    marker=series.marker,
                    markersize=8 if not series.style else 4,
                    markerfacecolor=series.color if series.style else "none",
                    linewidth=1.8 if series is JOINT else 1.1,
                    color=series.color,
                    label=None if number else series.name,
                    zorder=3 if series is JOINT else 2,
                )
        axes.axhline(whole[key], color="#777777", linewidth=0.8, linestyle=":", label="bf16")
        axes.set_title(text)
        axes.set_xlabel("linears in the blocks, MB")
        bytes_a_bit = rows[0]["linear_bytes"] / rows[0]["bpw"] / 1e6
        logarithmic(axes, bytes_a_bit)
    panels[0].set_ylabel("perplexity")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)


def logarithmic(axes: Axes, bytes_a_bit: float) -> None:
    """Both axes logarithmic with plain numbers; bits a weight at the top."""
    ends = (26, 86)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(20, 210))
    top = axes.twiny()
    top.set(xscale="log", xlim=[end / bytes_a_bit for end in ends])
    for axis, ticks in ((axes.xaxis, MB), (axes.yaxis, PERPLEXITY), (top.xaxis, BITS)):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    top.set_xlabel("bits a weight")
    axes.grid(color="#dddddd", linewidth=0.6)


def compress_linear(figure: Figure) -> None:
    """Processor seconds by blocks and by tokens, with the straight lines of the result file."""
    (row,) = result("compress_linear-cpu")
    most = {key: max(point[key] for point in row["points"]) for key in ("blocks", "tokens")}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, other in zip(panels, most, reversed(most), strict=True):
        points = [point for point in row["points"] if point[other] == most[other]]
        for point in points:
            runs = point["cpu_seconds"]
            axes.plot([point[key]] * len(runs), runs, "_", color="#777777", markersize=9)
            axes.plot(point[key], statistics.median(runs), "o", color="#0072b2", markersize=5)
        line = row[f"by_{key}"]
        ends = (0, most[key])
        heights = [line["intercept"] + line["slope"] * end for end in ends]
        axes.plot(ends, heights, color="#d55e00", linewidth=1.2, zorder=1)
        axes.set_title(f"{most[other]:,} {other}")
        axes.set_xlabel(key)
        ticks = [0, *sorted(point[key] for point in points)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set(xlim=(0, 1.06 * most[key]), ylim=(0, None))
        axes.grid(color="#dddddd", linewidth=0.6)
        unit, factor = ("block", 1) if key == "blocks" else ("1,000 tokens", 1000)
        said = f"{line['intercept']:.1f} s + {factor * line['slope']:.2f} s a {unit}"
        said += f"\nlargest deviation {line['deviation']:.1%}"
        axes.text(0.05, 0.95, said, transform=axes.transAxes, va="top", color="#b34700")
    panels[0].set_ylabel("processor seconds")


DRAWN: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "parts": (parts, (9, 5.6)),
    "compress_linear": (compress_linear, (8, 3.4)),
}


def svg(name: str) -> bytes:
    """The figure as a file, the same bytes at every call."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(
            "no matplotlib\nfigures are drawn with it\npip install matplotlib"
        ) from error
    draw, size = DRAWN[name]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        held = io.BytesIO()
        figure.savefig(held, format="svg", metadata={"Date": None, "Title": name})
    return held.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="draw, compare, write nothing")
    parser.add_argument("--shares", action="store_true", help="only print joint plans over others")
    options = parser.parse_args()
    if options.shares:
        for label, found in shares(result("parts-cuda")).items():
            print(
                f"{label}: " + ", ".join(f"{share:.3f} on {text}" for text, share in found.items())
            )
        return
    stale = []
    for name in DRAWN:
        file, new = FIGURES / f"{name}.svg", svg(name)
        if not file.is_file() or file.read_bytes() != new:
            stale.append(file.name)
            if not options.check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(new)
    common.tell_stale(stale, options.check)


if __name__ == "__main__":
    main()
