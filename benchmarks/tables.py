"""Write the tables of README and docs from benchmarks/results/*.json.

usage: python tables.py README.md docs/log.md [--check]
Everything between `<!-- table:NAME -->` and `<!-- /table -->` becomes the table of
results/NAME.json; the part of NAME before the first "-" is its kind.  `table:NAME PATTERN` takes
only the rows whose label has the pattern.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import speed_tables
from speed_tables import Table, number

MARKER = re.compile(r"(<!-- table:([\w.-]+)(?: ([^>]*?))? -->\n).*?(<!-- /table -->)", re.DOTALL)
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "wiki_validation": "wiki validation"}
TEXTS |= {"c4_validation": "C4 validation"}

# Rows of the table of steps, in its order; those of the whole recipe have labels of their own
STEPS = {"aptq-max, text only": "gptq + efficientqat + e2e_qp"}
STEPS["aptq-max"] = f"{STEPS['aptq-max, text only']}, written windows"
ORDER = "|gptq|gptq + efficientqat|gptq + e2e_qp|gptq + descent + efficientqat + e2e_qp|"
ORDER += "|".join(STEPS.values()) + "|"

RATIOS = {"ratio": "ratio", "ratio_saved": "ratio with saving", "ratio_cpu": "ratio of CPU time"}
RATIOS |= {"ratio_process": "ratio of processes"}


def text_name(key: str) -> str:
    """wikitext2_first8 -> "WikiText-2, first 8 windows"."""
    base, _, first = key.partition("_first")
    return TEXTS[base] + (f", first {first} windows" if first else "")


def calibration(row: dict[str, Any]) -> str:
    held = row["calibration"]
    if not held:
        return ""
    windows, own = (held.get(key, 0) // held["window"] for key in ("tokens", "written"))
    extra = f" + {own} written" if own else ""
    return f"{held['file'].removesuffix('.txt')} {windows}{extra} x {held['window']}"


def quality(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    keys = [key for row in rows for key in row if key.partition("_first")[0] in TEXTS]
    keys = list(dict.fromkeys(keys))
    lines = []
    for row in rows:
        label = f"**{row['label']}**" if row["ours"] else row["label"]
        scores = [number(row.get(key), 2) for key in keys]
        costs = [number(row["seconds"], 0), number(row["peak_gib"], 2)]
        bits, seed = number(row["bpw"], 4), str(row["seed"]) if row["calibration"] else ""
        lines.append([label, calibration(row), seed, bits, *scores, *costs])
    names = ("model", "calibration", "seed", "bpw", *map(text_name, keys), "seconds", "peak GiB")
    return names, lines


def allocation(result: dict[str, Any]) -> Table:
    """Quality by size, best first; rows of one recipe and several seeds stand together."""
    rows = sorted(result["rows"], key=lambda row: (-round(row["bpw"], 1), next(texts(row))))
    return quality(result | {"rows": rows})


def reconstruction(result: dict[str, Any]) -> Table:
    """As `allocation`, with the losses of the last stage that tuned."""
    rows = sorted(result["rows"], key=lambda row: (-round(row["bpw"], 1), next(texts(row))))
    names, lines = quality(result | {"rows": rows})
    for row, line in zip(rows, lines, strict=True):
        stage, losses = (list(row.get("tuned", {}).items()) or [("", {})])[-1]
        pairs = [
            [losses.get(key) for key in ends] for ends in (("start", "end"), ("first", "last"))
        ]
        shown = [
            " to ".join("?" if value is None else f"{value:.3g}" for value in pair)
            for pair in pairs
        ]
        line += [stage, *(shown if stage else ("", ""))]
    return (*names, "tuned last", "held-out loss", "training loss"), lines


def steps(result: dict[str, Any]) -> Table:
    """What every step adds at every size: perplexities, and their range over seeds."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        name, _, size = row["label"].partition(":")[0].rpartition(" ")
        name = row["label"].partition(": ")[2] if name == "steps" else name
        found.setdefault(STEPS.get(name, name), {}).setdefault(size, []).append(row)
    sizes = sorted({size for row in found.values() for size in row}, key=float, reverse=True)
    lines = [
        [name, *(" / ".join(spans(own.get(size, []))) for size in sizes)]
        for name, own in sorted(found.items(), key=lambda item: ORDER.find(f"|{item[0]}|"))
    ]
    return ("stages", *(f"{size} bpw" for size in sizes)), lines


def spans(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Perplexity on both texts, least and largest where there are several seeds."""
    for key in ("wikitext2", "c4") if rows else ():
        ends = sorted({number(find(row[key] for row in rows), 2) for find in (min, max)})
        yield " to ".join(ends)


def texts(row: dict[str, Any]) -> Iterator[float]:
    """Perplexities of a row."""
    return (value for key, value in row.items() if key.partition("_first")[0] in TEXTS)


def fits(result: dict[str, Any]) -> Table:
    lines = []
    for row in result["rows"]:
        figures = [row[key] for key in ("limit_bytes", "predicted_bytes", "peak_bytes")]
        cells = [number(value / 2**20, 1) for value in (*figures, row["reserved_bytes"])]
        lines.append([row["label"], row["grid"], *cells, "yes" if row["holds"] else "no"])
    names = ("budget", "grid", "limit MiB", "predicted peak", "peak", "reserved", "holds")
    return names, lines


def compress_time(result: dict[str, Any]) -> Table:
    lines = []
    for row in result["rows"]:
        for index, one in enumerate(row["pairs"], 1):
            mine, peer = one["ours"], one["theirs"]
            times = [mine["seconds"], peer["oneshot"], peer["save"], mine["process"]]
            cells = [number(t, 1) for t in (*times, peer["process"])]
            cells += [number(one[kind], 3) for kind in RATIOS]
            lines.append([f"{row['label']}, pair {index}", *cells])
        if row["pairs"]:
            cells = [f"**{number(row[f'{kind}_median'], 3)}**" for kind in RATIOS]
            lines.append([f"{row['label']}, median", "", "", "", "", "", *cells])
    names = ("run", "ours, s", "oneshot, s", "its saving, s", "our process, s", "its process, s")
    return (*names, *RATIOS.values()), lines


def cpu_speed(result: dict[str, Any]) -> Table:
    """Decoding and prefill beside bf16; torch's int4 where it was measured too."""
    lines = []
    for row in result["rows"]:
        known = {(one["model"], one["case"], one["batch"]): one for one in row["speeds"]}
        ones = [known[name, "decode", 1] for name in ("bf16", "packed")]
        cells = [number(one["rate"], 1) for one in ones]
        wanted = [("packed", "decode", 1), ("torch int4", "decode", 1)]
        wanted += [("packed", "decode", 8), ("packed", "prefill", 1)]
        cells += [number(known[key]["ratio"], 2) if key in known else "" for key in wanted]
        held = row["resident_bytes"]
        cells += [number(held[name] / 2**20, 0) for name in ("bf16", "packed")]
        lines.append([row["label"], *cells])
    names = ("model: grid", "bf16, tokens/s", "ours, tokens/s", "ratio", "ratio of torch's int4")
    more = ("ratio, batch 8", "ratio, prefill", "bf16 holds, MiB", "ours holds, MiB")
    return (*names, *more), lines


def profile(result: dict[str, Any]) -> Table:
    """The functions with most time of their own in the last profiled run."""
    runs = [row["profile"] for row in result["rows"] if "profile" in row]
    found = sorted(runs[-1], key=lambda row: -row["own"])[:15] if runs else []
    lines = [
        [
            f"`{row['name']}`",
            row["where"],
            str(row["calls"]),
            number(row["own"], 2),
            number(row["total"], 2),
        ]
        for row in found
    ]
    return ("function", "where", "calls", "own seconds", "with callees"), lines


def memory(result: dict[str, Any]) -> Table:
    lines = []
    for row in result["rows"]:
        for run in row["runs"]:
            peak = number(run["peak_anonymous_bytes"] / 2**20, 0)
            lines.append([row["label"], str(run["blocks"]), peak, number(run["seconds"], 0), ""])
        block = number(row["block_bytes"] / 2**20, 0)
        text = f"{number(row['difference_blocks'], 3)} of a {block} MiB block"
        lines.append([row["label"], "difference", "", "", text])
    return ("run", "blocks", "peak anonymous MiB", "seconds", "difference"), lines


def greedy(result: dict[str, Any]) -> Table:
    lines = []
    for row in result["rows"]:
        identical = f"{row['prompts_identical']} of {row['prompts']}"
        nll = f"{row['nll_fast']:.5f} / {row['nll_dense']:.5f} ({row['nll_difference']:+.3%})"
        bytes_ = f"{row['resident_bytes'] / 1e6:.1f} / {row['disk_bytes'] / 1e6:.1f} MB"
        lines.append([row["label"], identical, nll, f"{bytes_} ({row['resident_ratio'] - 1:+.1%})"])
    return ("checkpoint", "prompts identical", "NLL fast / dense", "resident / on disk"), lines


KINDS: dict[str, Callable[[dict[str, Any]], Table]] = {
    "quality": quality,
    "peers": quality,
    "gguf_types": quality,
    "allocation": allocation,
    "reconstruction": reconstruction,
    "steps": steps,
    "validation": quality,
    "compress_time": compress_time,
    "cpu_speed": cpu_speed,
    "profile": profile,
    "memory": memory,
    "greedy": greedy,
    "fits": fits,
    "parts": allocation,
    "kernels": speed_tables.kernels,
    "prefill": speed_tables.prefill,
    "decode": speed_tables.decode,
    "throughput": speed_tables.throughput,
    "phases": speed_tables.phases,
}


SOURCES = {"profile": "compress_time", "steps": "reconstruction"}  # kinds that share a file
SOURCES |= {"prefill": "kernels", "phases": "throughput"}


def markdown(name: str, folder: Path, pattern: str = "") -> str:
    """The table called `name`, with a line on where its figures come from."""
    kind = name.partition("-")[0]
    if kind not in KINDS:
        raise SystemExit(f"table {name}: no kind {kind!r}; known: {', '.join(KINDS)}")
    source = SOURCES.get(kind, kind) + name.removeprefix(kind)
    file = folder / f"{source}.json"
    if not file.exists():
        raise SystemExit(f"table {name}: there is no {file}; run the benchmark first")
    result = json.loads(file.read_text(encoding="utf-8"))
    chosen = [row for row in result["rows"] if re.search(pattern, row.get("label", ""))]
    names, lines = KINDS[kind](result | {"rows": chosen})
    rows = [list(names), ["---"] * len(names), *lines]
    used = {key: value for key, value in result["versions"].items() if key != "python"}
    versions = ", ".join(f"{key} {value}" for key, value in used.items())
    head = f"{result['device']}, {versions}, commit {result['commit']}, {result['date'][:10]}."
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{head}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    stale = []
    for file in options.files:
        old = file.read_text(encoding="utf-8")
        new = MARKER.sub(lambda m: m[1] + markdown(m[2], options.results, m[3] or "") + m[4], old)
        if new != old:
            stale.append(str(file))
            if not options.check:
                file.write_text(new, encoding="utf-8")
    common.tell_stale(stale, options.check)


if __name__ == "__main__":
    main()
