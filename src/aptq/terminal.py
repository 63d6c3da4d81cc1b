"""What people see: progress on stderr, tables on stdout."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import psutil
from rich import progress
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from aptq.contents import Contents, Entry
from aptq.core.scores import Scores
from aptq.outlook import Line, Outlook, reasons, thinned
from aptq.report import front
from aptq.report.summary import Summary
from aptq.work import Step

BARS = "▁▂▃▄▅▆▇█"


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers: this program shows its own."""
    disable_progress_bar()


class Display:
    """Progress bars with the time left; lines of text go above them.  `quiet` shows nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.progress = progress.Progress(
            progress.TextColumn("{task.description:<14}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[memory]}"),
            console=self.console,
            disable=quiet,
            speed_estimate_period=3600,  # blocks take minutes; of 30 s nothing would be known
        )
        self.tasks: dict[str, progress.TaskID] = {}

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Step | str) -> None:
        """Show one event of the pipeline."""
        if isinstance(event, str):
            if not self.quiet:
                self.console.print(event, highlight=False, soft_wrap=True)
            return
        if event.phase not in self.tasks:
            # one unit tells nothing about the time left: a moving bar instead
            total = event.total if event.total > 1 else None
            self.tasks[event.phase] = self.progress.add_task(event.phase, total=total, memory="")
        self.progress.update(
            self.tasks[event.phase],
            completed=event.done,
            total=event.total if event.total > 1 or event.done else None,
            memory=size(psutil.Process().memory_info().rss),
        )


def size(nbytes: int) -> str:
    """Bytes for people: "98.4 MiB"."""
    value, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of words to the left, of numbers to the right."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show_summary(summary: Summary) -> None:
    """The final table of a run."""
    numbers = ("layers", "bits", "error", "before", "after", "rescues")
    table = _table(summary.source, ("role", "grid"), numbers)
    for row in summary.roles:
        table.add_row(
            row.role,
            row.grid,
            str(row.layers),
            f"{row.bits:.4f}",
            f"{row.error:.2e}",
            size(row.before),
            size(row.after),
            str(row.fallbacks),
        )
    table.add_row(
        "checkpoint",
        "",
        str(summary.layers),
        f"{summary.bits:.4f}",
        "",
        size(summary.bytes_before),
        size(summary.bytes_after),
        str(summary.fallbacks),
        style="bold",
    )
    console = Console()
    console.print(table)
    if len(summary.histogram) > 1:
        console.print("\n".join(_bars(summary.histogram)), highlight=False)
    console.print("\n".join(_notes(summary)), highlight=False)


def _notes(summary: Summary) -> list[str]:
    """What the table has no place for."""
    lines = list(_through(summary))
    if summary.expected_loss is not None:
        lines.append(f"expected loss {_nats(summary.expected_loss)}")
    lines += [f"{summary.seconds:.1f} s, {summary.tokens:,} calibration tokens"]
    if summary.parameters:
        lines += [_parameters(**summary.parameters)]
    if summary.routed is not None:
        fewest, most = summary.routed
        idle = summary.counts.get("idle", 0)
        lines += [f"tokens that reached an expert: {fewest:,} to {most:,}; idle matrices {idle:g}"]
    lines += [f"{summary.fallbacks} of {summary.layers} matrices used a fallback"]
    noted = ", ".join(f"{name} {count:g}" for name, count in sorted(summary.counts.items()))
    return lines + ([f"reported by the stages: {noted}"] if noted else [])


def _parameters(compressed: int, kept: int, skipped: int, total: int) -> str:
    """What became of the parameters."""
    parts = f"compressed {compressed:,} + kept {kept:,} + skipped {skipped:,}"
    return f"parameters: {total:,} = {parts}"


def _bars(histogram: Mapping[str, int]) -> list[str]:
    """How many layers have which grid."""
    most = max(histogram.values())
    return [
        f"{grid:<16} {count:>5} {'█' * max(1, round(40 * count / most))}"
        for grid, count in histogram.items()
    ]


def spark(values: Sequence[float]) -> str:
    """One character for each value, the least as the lowest bar and the largest as the highest."""
    low, high = min(values), max(values)
    return "".join(BARS[round((x - low) / ((high - low) or 1) * (len(BARS) - 1))] for x in values)


def _through(summary: Summary) -> Iterator[str]:
    """Bits and errors through the depth of the model, and what each phase took."""
    for word, values in zip(("bits", "error"), zip(*summary.blocks, strict=True), strict=False):
        ends = f"{min(values):.3g} to {max(values):.3g}"
        yield f"{word} by block{' ' * (6 - len(word))}{spark(values)}  {ends}"
    steps = [f"{name} {_duration(x['seconds'])}" for name, x in summary.phases.items()]
    if steps:
        most = max(x["memory"] for x in summary.phases.values())
        yield f"{', '.join(steps)}; memory {size(most)}"


def _nats(loss: tuple[float, float]) -> str:
    return f"{loss[0]:.4f} ± {loss[1]:.4f} nats per token"


def show_scores(scores: Scores) -> None:
    """What a measure found: losses per candidate, summed over the layers."""
    title = f"{scores.measure}, {scores.unit}, {len(scores.losses)} layers"
    table = _table(title, ("candidate",), ("all layers", "largest", "of layer"))
    for number, candidate in enumerate(scores.candidates):
        row = {name: losses[number] for name, losses in scores.losses.items()}
        worst = max(row, key=lambda name: row[name])
        total = sum(max(value, 0.0) for value in row.values())
        table.add_row(candidate, f"{total:.4g}", f"{row[worst]:.4g}", worst)
    console = Console()
    console.print(table)
    if scores.factor is not None:
        console.print(f"one unit is {scores.factor:.4g} nats (residual {scores.residual:.2f})")


def show_outlook(found: Outlook) -> None:
    """Budgets with their needs, what stays 16 bit, and the front as table and picture."""
    console = Console()
    for line in found.lines:
        console.print("\n".join(_budget(found, line)), highlight=False, soft_wrap=True)
    table = _table(f"best {found.unit} by size", (), ("bits", "checkpoint", "loss", "noise"))
    for point in thinned(found.front):
        noise = f"{point.noise:.2g}" if point.noise else ""
        table.add_row(f"{point.bits:.4f}", size(point.nbytes), f"{point.loss:.4g}", noise)
    console.print(table)
    chosen = [line.choice for line in found.lines]
    marks = [(one.bits, one.loss) for one in chosen if one.loss is not None]
    print(front.picture([(point.bits, point.loss) for point in found.front], marks))
    console.print("\n".join(found.notes), highlight=False, soft_wrap=True)


def _budget(found: Outlook, line: Line) -> list[str]:
    """One budget in words."""
    needs, memory = line.effort, line.running
    parts = ", ".join(f"{name} {size(count)}" for name, count in needs.parts.items())
    lines = [
        f"{line.budget or 'as given'}: {line.choice.bits:.4f} bpw, checkpoint "
        f"{size(line.choice.nbytes)} ({line.choice.nbytes:,} bytes) of {size(found.bytes_before)}",
        *(f"  {text}" for text in _bars(line.grids)),
        f"  to compress: memory {size(needs.memory)} ({parts})",
        f"               disk {size(needs.disk)}, about {_duration(needs.seconds)} "
        "(estimated from counted operations: right within a factor of 2)",
    ]
    if memory is not None:
        lines.append(
            f"  to run at {found.context:,} tokens on a GPU: {size(memory.peak)} = weights "
            f"{size(memory.weights)} + cache {size(memory.cache)} + work {size(memory.work)}"
        )
    if line.choice.loss is not None:
        lines.append(f"  expected loss {_nats((line.choice.loss, line.choice.noise or 0.0))}")
    if line.choice.next is not None:
        lines.append(f"  the next budget that loses less: {line.choice.next}")
    for why, names in reasons(line.kept):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(f"  16 bit: {len(names)} layers ({shown}): {why}")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_evaluation(result: dict[str, Any]) -> None:
    """Perplexity before and after, and the divergence."""
    title = f"{result['text']}: {result['windows']} windows of {result['window']} tokens"
    compared = result["reference"] is not None
    more = ("KL to the original", "same top token") if compared else ()
    table = _table(title, (), ("perplexity", *more))
    table.add_column("model", overflow="fold")
    if compared:
        reference = result["reference"]
        table.add_row(f"{reference['perplexity']:.3f}", "", "", reference["model"])
    cells = (f"{result['kl']:.4f}", f"{100 * result['agreement']:.1f} %") if compared else ()
    table.add_row(f"{result['perplexity']:.3f}", *cells, result["model"])
    Console().print(table)


def show_contents(found: Contents, *, layers: bool) -> None:
    """What is in a checkpoint; with `layers` line by line."""
    console = Console()
    lines = [
        f"{found.source} ({found.model_type}), written by aptq {found.package}",
        f"{found.bits:.4f} bits per weight, {found.nbytes:,} bytes",
    ]
    lines += [_parameters(**found.parameters._asdict(), total=found.parameters.total)]
    if (held := found.verified) is not None:
        lines += [f"every hash is right: {held.files} files, {held.tensors} tensors, all decoded"]
        lines += [f"not finite in the source: {x}, {n:,} values" for x, n in held.nonfinite.items()]
    console.print("\n".join(lines), highlight=False)
    if layers or found.run is None:
        table = _table("", ("layer", "grid"), ("bits", "bytes", "error"))
        for line in found.layers:
            error = "" if line.error is None else f"{line.error:.3e}"
            table.add_row(line.name, line.grid, f"{line.bits:.4f}", f"{line.nbytes:,}", error)
        console.print(table)
    if found.run is not None:
        show_summary(found.run)
        if found.run.evaluation is not None:
            show_evaluation(found.run.evaluation)


def show_catalogue(entries: Sequence[Entry], recipes: Sequence[str], *, markdown: bool) -> None:
    """Methods with their options, on the terminal or as Markdown for docs/methods.md."""
    if markdown:
        print("# Methods\nGenerated by `aptq list --markdown` from the dataclasses.")
        for entry in entries:
            print(f"\n## {entry.name} ({entry.family})\n{entry.about}\n")
            print("| option | type | default | meaning |\n|---|---|---|---|")
            for name, kind, default, why in entry.options:
                print(f"| {name} | {kind.replace('|', 'or')} | {default} | {why} |")
        return
    console = Console()
    for entry in entries:
        console.print(f"[bold]{entry.name}[/] ({entry.family}): {entry.about}", highlight=False)
        table = Table(box=None, show_header=False)
        for option in entry.options:
            name = f"{option.name} = {option.default}" if option.default else option.name
            table.add_row(name, option.kind, option.why)
        console.print(table)
    console.print(f"recipes: {', '.join(recipes)}", highlight=False)
