"""The report of a run: one HTML file, the answer first, then why, then how."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from aptq.report import plots, quality
from aptq.report.facts import Cell, Facts, collect
from aptq.report.markup import Plot, card, document, duration, esc, facts, folded, size, table

COUNTS = {
    "fallbacks": "numerical rescues",
    "dead": "input columns that were always zero",
    "dropped": "inputs left out because they were not finite",
    "unweighted": "layers without a profile of their own",
}
SECTIONS = (
    ("Where the bits went", (plots.bits, plots.sensitivity, plots.front)),
    ("What it cost", (quality.section,)),
    ("What happened to the model", (plots.depth,)),
    ("What it took", (plots.phases,)),
)


def write(folder: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `folder` to `out`, by default its report.html.

    Raises ValueError where the run is not complete or Plotly is not installed.
    """
    found, target = collect(folder), out or folder / "report.html"
    target.write_text(page(found), "utf-8")
    return target


def page(found: Facts) -> str:
    """The report as HTML."""
    drawn: list[Plot] = []
    body = [_head(found), _cards(found)]
    for title, makers in SECTIONS:
        made = [make(found) for make in makers]
        if any(text for _, text in made):
            body.append(f"<section><h2>{esc(title)}</h2>{''.join(x for _, x in made)}</section>")
        drawn += [plot for some, _ in made for plot in some]
    body += [_coverage(found), _identity(found)]
    title = f"{found.name}, {found.summary.bits:.4g} bits per weight"
    return document(title, "\n".join(body), drawn, found.start["aptq"])


def _head(found: Facts) -> str:
    """The answer in one sentence or two."""
    run = found.summary
    said = [
        f"<b>{size(run.bytes_before)} became {size(run.bytes_after)}</b>: "
        f"{run.bytes_before / run.bytes_after:.2f} times smaller, "
        f"{run.bits:.4g} bits for each weight of the blocks."
    ]
    measured = run.evaluation
    if measured and measured.get("reference") and measured.get("perplexity"):
        said.append(f"On {esc(Path(str(measured['text'])).name)} the {_quality(measured)}.")
    elif run.expected_loss is not None:
        said.append(f"Expected loss: <b>{run.expected_loss[0]:.3g} nats a token</b>.")
    head = f'<p class="kicker">aptq, report of a run</p><h1>{esc(found.name)}</h1>'
    return f'<header>{head}<p class="lede">{" ".join(said)}</p></header>'


def _quality(measured: dict[str, object]) -> str:
    """Perplexity before and after, in words."""
    reference = measured["reference"]
    assert isinstance(reference, dict)
    before, after = reference["perplexity"], measured["perplexity"]
    change = float(str(after)) / before - 1
    return f"perplexity went <b>from {before:.2f} to {after:.2f}</b> ({change:+.1%})"


def _cards(found: Facts) -> str:
    run, measured = found.summary, found.summary.evaluation or {}
    share = run.bytes_after / run.bytes_before
    asked = found.settings.get("budget") or "no budget: one grid or a given plan"
    cards = [
        card("Size", *size(run.bytes_after).split(), f"{share:.1%} of the original", share),
        card("Bits a weight", f"{run.bits:.4f}", "", f"asked: {asked}"),
    ]
    if run.expected_loss is not None:
        loss, noise = run.expected_loss
        cards.append(card("Expected loss", f"{loss:.3g}", "nats", f"± {noise:.2g} a token"))
    if measured.get("kl") is not None:
        same = f"same top token at {measured['agreement']:.1%} of positions"
        cards.append(card("KL to the original", f"{measured['kl']:.3g}", "nats", same))
    elif measured.get("perplexity") is not None:
        cards.append(card("Perplexity", f"{measured['perplexity']:.2f}", "", measured["text"]))
    else:
        note = "aptq eval RUN --reference MODEL measures it"
        cards.append(card("Quality", "not yet", "measured", note))
    peak = max((x["memory"] for x in found.summary.phases.values()), default=0)
    note = f"{size(peak)} of memory, {found.start['device']}" if peak else found.start["device"]
    cards.append(card("Time", *duration(run.seconds).split(), note))
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _coverage(found: Facts) -> str:
    """What was compressed, what was not, and what needed help."""
    run, inside = found.summary, found.inside()
    kept = [cell.name for cell in inside if cell.grid in ("keep", "bf16")]
    outside = [f"{cell.name} ({cell.grid})" for cell in found.cells if cell.block is None]
    pairs: list[tuple[str, object]] = [
        ("Linears compressed", f"{len(inside) - len(kept)} of {len(inside)}"),
        ("Kept at 16 bits", ", ".join(kept) or "none"),
        ("Outside the blocks", ", ".join(outside) or "embedding and head as they were"),
        ("Layers that needed a numerical rescue", f"{run.fallbacks} of {run.layers}"),
    ]
    counts = {key: value for key, value in run.counts.items() if key != "fallbacks"}
    pairs += [(COUNTS.get(key, key), f"{value:g}") for key, value in sorted(counts.items())]
    data = found.start["data"]
    if data:
        windows = f"{data['samples']} windows of {data['length']} tokens"
        pairs.append(("Calibration", f"{windows} of {data['source']} ({run.tokens:,} tokens)"))
    rescued = [cell for cell in found.cells if cell.counts.get("fallbacks")]
    more = _layers(rescued, "Rescued layers") if rescued else ""
    every = _layers(found.cells, "All layers")
    return f"<section><h2>Coverage</h2>{facts(pairs)}{more}{every}</section>"


def _layers(cells: Iterable[Cell], title: str) -> str:
    rows = [
        [
            cell.name,
            cell.grid,
            f"{cell.bits:.4f}",
            f"{cell.error:.2e}",
            "" if cell.score is None else f"{cell.score:.2e}",
            "" if cell.damping is None else f"{cell.damping:g}",
            ", ".join(f"{key} {value:g}" for key, value in Counter(cell.counts).items()),
        ]
        for cell in cells
    ]
    heads = ["layer", "grid", "bits", "error", "predicted loss", "damping", "noted"]
    return folded(title, table(heads, rows))


def _identity(found: Facts) -> str:
    """Who made it from what: enough to make it again."""
    start, data = found.start, found.start["data"] or {}
    made = [f"{key} {value}" for key, value in (found.summary.rule or {}).items()]
    pairs: list[tuple[str, object]] = [
        ("Source", start["source"]),
        ("Family", f"{start['model_type']}, {start['dtype']}"),
        ("Plan", ", ".join(made) or "as given"),
        ("Seed", found.settings.get("seed", "")),
        ("Text, SHA-256", data.get("sha256", "none was read")),
        ("Device", f"{start['device']}, {start['threads']} threads"),
        *((key, start[key]) for key in ("aptq", "torch", "transformers", "python")),
    ]
    recipe = f'<pre tabindex="0" aria-label="recipe.toml">{esc(found.recipe)}</pre>'
    again = "The recipe and plan.json beside this file repeat the run, byte for byte."
    return (
        f"<section><h2>Recipe and identity</h2><p class='soft'>{esc(again)}</p>{facts(pairs)}"
        f"{folded('recipe.toml', recipe)}</section>"
    )
