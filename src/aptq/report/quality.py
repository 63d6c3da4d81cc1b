"""What was measured of a run: figures with intervals by text and position, and tasks."""

from typing import Any

from aptq.report.facts import Facts
from aptq.report.markup import Plot, lines, table

Found = dict[str, Any]  # eval.json, or one text of it; keys that were not measured may lack


def section(facts: Facts) -> tuple[list[Plot], str]:
    """Tables, and a plot of the divergence by position where it is known."""
    found = facts.summary.evaluation
    if not found:
        return [], ""
    parts: list[str] = []
    plots: list[Plot] = []
    if found.get("perplexity") is not None:
        texts = [one for one in [found, *found.get("texts", [])] if one.get("perplexity")]
        heads = ["text", "perplexity", "95 %", "KL, nats", "95 %", "same top token"]
        parts.append(table(heads, [_row(one) for one in texts], "Measured by aptq eval"))
    if found.get("tasks"):
        heads = ["task", "metric", "this run", "±", "items", "original", "difference", "p"]
        parts.append(table(heads, [_task(one) for one in found["tasks"]], "Zero-shot tasks"))
    bins = [one for one in found.get("positions", []) if one.get("kl") is not None]
    if len(bins) > 1:
        y = [one["kl"] for one in bins]
        series = [{"name": "KL", "x": [1 + one["first"] for one in bins], "y": y}]
        says = f"From {y[0]:.3g} at the beginning of a window to {y[-1]:.3g} at its end."
        axes = "position in the window, from", "KL, nats per token"
        plots, text = lines("positions", "Divergence by position", says, axes, series, xlog=True)
        parts.append(text)
    return plots, "".join(parts)


def _row(one: Found) -> list[str]:
    kl, same = one.get("kl"), one.get("agreement")
    return [
        str(one["text"]),
        f"{one['perplexity']:.3f}",
        _ends(one.get("perplexity_interval"), ".2f"),
        "" if kl is None else f"{kl:.4f}",
        _ends(one.get("kl_interval"), ".4f"),
        "" if same is None else f"{same:.1%}",
    ]


def _ends(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _task(one: Found) -> list[str]:
    head = [one["task"], one["metric"], f"{one['value']:.1%}", f"{one['stderr']:.1%}"]
    other = one.get("against")
    if other is None:
        return [*head, str(one["items"]), "", "", ""]
    moved = f"{other['difference']:+.1%} ± {other['stderr']:.1%}"
    return [*head, str(one["items"]), f"{other['value']:.1%}", moved, f"{other['p']:.2g}"]
