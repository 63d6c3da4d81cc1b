"""The model card of a run: what was done, with what, and what it cost, in Markdown."""

from pathlib import Path

from aptq.report.summary import Summary, read

MIB = 1 << 20


def write(folder: Path) -> None:
    """Write README.md of the run in `folder` from its recipe, log and evaluation."""
    recipe = (folder / "recipe.toml").read_text("utf-8")
    (folder / "README.md").write_text(text(read(folder), recipe), "utf-8")


def text(summary: Summary, recipe: str) -> str:
    """The card for a run and its recipe (TOML)."""
    lines = [
        "---",
        "library_name: aptq",
        "tags: [quantized, aptq]",
        "---",
        f"# {Path(summary.source).name}, {summary.bits:.4g} bits per weight",
        "",
        f"Compressed from `{Path(summary.source).name}` with aptq. "
        "The licence of the original model applies.",
        "",
        "```python",
        "import aptq",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("checkpoint")',
        "```",
        "",
        "## Figures",
        f"- Size: {summary.bytes_before / MIB:.1f} MiB before, "
        f"{summary.bytes_after / MIB:.1f} MiB after",
        f"- Bits per weight of the linears in the blocks, everything counted: {summary.bits:.4f}",
        f"- Calibration tokens: {summary.tokens:,}",
        f"- Layers that needed a numerical rescue: {summary.fallbacks} of {summary.layers}",
        *_allocation(summary),
        *_evaluation(summary),
        "",
        *_rows(summary),
        "",
        "## Recipe",
        "```toml",
        recipe.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _allocation(summary: Summary) -> list[str]:
    """How the plan was chosen, what it consists of, and what it was expected to cost."""
    lines = []
    if summary.rule:
        made = ", ".join(f"{key} {value}" for key, value in summary.rule.items())
        grids = ", ".join(f"{count} x {grid}" for grid, count in summary.histogram.items())
        lines.append(f"- Plan: {made}; layers: {grids}")
    if summary.expected_loss is not None:
        loss, noise = summary.expected_loss
        lines.append(f"- Expected loss: {loss:.4f} ± {noise:.4f} nats a token")
    return lines


def _evaluation(summary: Summary) -> list[str]:
    found = summary.evaluation
    if found is None:
        return ["- Not evaluated yet"]
    lines = [f"- Perplexity on {found['text']}: {found['perplexity']:.3f}"]
    if found["reference"] is not None:
        reference = found["reference"]
        lines[0] += f" (original {reference['perplexity']:.3f})"
        lines.append(
            f"- KL to the original: {found['kl']:.4f} nats a token; "
            f"the same most likely token at {100 * found['agreement']:.1f} % of positions"
        )
    return lines


def _rows(summary: Summary) -> list[str]:
    return [
        "| layers | grid | count | bits | relative error | MiB before | MiB after |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.role} | {row.grid} | {row.layers} | {row.bits:.4f} | {row.error:.3e} "
            f"| {row.before / MIB:.2f} | {row.after / MIB:.2f} |"
            for row in summary.rows
        ),
    ]
