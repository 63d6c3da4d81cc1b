"""Several runs on one page: what each costs, what each loses, and where their bits went."""

from collections.abc import Sequence
from pathlib import Path

from aptq.report.facts import Facts, by_block, collect, mean_bits
from aptq.report.markup import Plot, document, duration, esc, lines, size, table

MEASURES = (  # of eval.json first: what was measured counts more than what was expected
    ("kl", "KL to the original, nats per token"),
    ("perplexity", "perplexity"),
    ("loss", "expected loss, nats per token"),
)


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write the comparison of the runs in `folders` to `out`.  Raises ValueError as page.write."""
    runs = [collect(folder) for folder in folders]
    out.write_text(page(runs), "utf-8")
    return out


def page(runs: Sequence[Facts]) -> str:
    """The comparison as HTML."""
    names = _names(runs)
    rows = [_row(name, run) for name, run in zip(names, runs, strict=True)]
    heads = ["run", "budget", "size", "bits", "perplexity", "KL", "expected loss", "time"]
    least = min(runs, key=lambda run: run.summary.bytes_after)
    said = (
        f"{len(runs)} runs, from {size(least.summary.bytes_after)} to "
        f"{size(max(run.summary.bytes_after for run in runs))}."
    )
    texts = {(run.summary.evaluation or {}).get("text") for run in runs}
    if len(texts) > 1:
        said += " Not all were measured, or not on one text: their figures do not compare."
    drawn = [_sizes(names, runs), _depth(names, runs)]
    head = f'<header><h1>Runs compared</h1><p class="lede">{esc(said)}</p></header>'
    body = f"{head}<section><h2>Figures</h2>{table(heads, rows)}</section>"
    body += "".join(f"<section>{text}</section>" for _, text in drawn)
    found = [plot for some, _ in drawn for plot in some]
    return document("Runs compared", body, found, runs[0].start["aptq"])


def _names(runs: Sequence[Facts]) -> list[str]:
    """Names of the folders, with their parents where two are alike."""
    short = [run.folder.resolve().name for run in runs]
    alike = len(set(short)) < len(short)
    return [str(run.folder) if alike else name for run, name in zip(runs, short, strict=True)]


def _row(name: str, run: Facts) -> list[str]:
    held, found = run.summary, run.summary.evaluation or {}
    kl, perplexity = found.get("kl"), found.get("perplexity")
    return [
        name,
        run.settings.get("budget") or "",
        size(held.bytes_after),
        f"{held.bits:.4f}",
        "" if perplexity is None else f"{perplexity:.2f}",
        "" if kl is None else f"{kl:.3g}",
        "" if held.expected_loss is None else f"{held.expected_loss[0]:.3g}",
        duration(held.seconds),
    ]


def _sizes(names: Sequence[str], runs: Sequence[Facts]) -> tuple[list[Plot], str]:
    """Size against the best measure that all runs have."""
    found = [({"loss": run.summary.expected_loss} | (run.summary.evaluation or {})) for run in runs]
    known = [(key, word) for key, word in MEASURES if all(one.get(key) for one in found)]
    if not known:
        return [], ""
    key, word = known[0]
    values = [one[key][0] if key == "loss" else one[key] for one in found]
    series = [
        {
            "name": name,
            "x": [run.summary.bytes_after / 2**20],
            "y": [value],
            "mode": "markers",
            "large": True,
            "hover": [[name, f"{size(run.summary.bytes_after)}", f"{word}: {value:.4g}"]],
        }
        for name, run, value in zip(names, runs, values, strict=True)
    ]
    says = "Lower and further to the left is better."
    return lines("sizes", "Size against quality", says, ("MiB", word), series)


def _depth(names: Sequence[str], runs: Sequence[Facts]) -> tuple[list[Plot], str]:
    series = []
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        blocks = by_block(run.cells)
        y = [round(mean_bits(cells), 4) for cells in blocks.values()]
        series.append({"name": name, "x": list(blocks), "y": y, "dash": number // 7 % 4})
    says, axes = "Mean over the linears of each block.", ("block", "stored bits per weight")
    return lines("depth", "Bits through depth", says, axes, series)
