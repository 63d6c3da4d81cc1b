"""The plots of one run: what page/page.js shall draw, what it says in words, and its table."""

from collections.abc import Sequence

from aptq.report.facts import Cell, Facts, by_block, curves, mean_bits, mean_error
from aptq.report.markup import Plot, duration, figure, lines, size, table

Drawn = tuple[list[Plot], str]  # plots and their HTML
BITS = "stored bits per weight"
MOST = 9.0  # bits that are drawn: 16-bit layers would squeeze all others into a corner


def bits(facts: Facts) -> Drawn:
    """Block by role: how many bits went where."""
    cells = facts.inside()
    if not cells:
        return [], ""
    at: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        at.setdefault((cell.role, cell.block or 0), []).append(cell)
    roles, columns = list(dict.fromkeys(role for role, _ in at)), sorted({b for _, b in at})
    grid = [[at.get((role, block), []) for block in columns] for role in roles]
    z = [[round(mean_bits(held), 4) if held else None for held in row] for row in grid]
    shown = [value for row in z for value in row if value is not None]
    plot: Plot = {
        "id": "bits",
        "kind": "heat",
        "x": "block",
        "unit": "bits",
        "columns": columns,
        "rows": roles,
        "z": z,
        "hover": [[_hover(facts, held) for held in row] for row in grid],
        "low": int(min(shown)),
        "high": min(8, -int(-max(shown) // 1)),  # 16-bit layers look like 8: they are few
    }
    plot["high"] = max(plot["high"], plot["low"] + 1)
    least, most = min(cells, key=lambda x: x.bits), max(cells, key=lambda x: x.bits)
    says = f"All layers have {least.grid}: {least.bits:.4g} bits each."
    if least.bits < most.bits:
        says = (
            f"From {least.bits:.3g} bits ({least.role} of block {least.block}) to {most.bits:.3g} "
            f"({most.role} of block {most.block}); {mean_bits(cells):.4g} on average."
        )
    rows = [[block, *(_grids(at.get((role, block), [])) for role in roles)] for block in columns]
    return [plot], figure(plot, "Bits of every layer", says, table(["block", *roles], rows))


def _grids(held: Sequence[Cell]) -> str:
    """The grid of a cell of the table, with its bits."""
    if not held:
        return ""
    names = dict.fromkeys(cell.grid for cell in held)
    return f"{', '.join(names)}: {mean_bits(held):.3g}"


def _hover(facts: Facts, held: Sequence[Cell]) -> list[str]:
    """What is known of the layers of one field."""
    if not held:
        return []
    first, more = held[0], f" and {len(held) - 1} more" if len(held) > 1 else ""
    lines = [f"{first.name}{more}", f"{_grids(held)} bits a weight"]
    lines.append(f"scales: one for {first.group}")
    scores = [cell.score for cell in held if cell.score is not None]
    if scores:
        lines.append(f"predicted loss: {sum(scores):.3g} {facts.unit}")
    lines.append(f"weight error: {mean_error(held):.3g}")
    if first.damping is not None:
        lines.append(f"damping: {first.damping:g} of the mean diagonal")
    return lines + [f"{key}: {value:g}" for key, value in first.counts.items()]


def sensitivity(facts: Facts) -> Drawn:
    """Predicted loss by size, for each role."""
    found = curves(facts)
    if not found:
        return [], ""
    shown = {role: [x for x in points if x[0] < MOST] for role, points in found.items()}
    series = [
        {"name": role, "x": [x for x, _ in points], "y": [y for _, y in points], "dash": n // 7}
        for n, (role, points) in enumerate(shown.items())
    ]
    ends = {role: points[0] for role, points in found.items()}
    worst = max(ends, key=lambda role: ends[role][1])
    says = (
        "What the model would lose if all layers of one kind had so many bits. "
        f"Most sensitive at the smallest size: {worst}, {ends[worst][1]:.3g} {facts.unit} "
        f"at {ends[worst][0]:.3g} bits."
    )
    axes = BITS, f"predicted loss, {facts.unit}"
    return lines("curves", "Sensitivity", says, axes, series, log=True)


def depth(facts: Facts) -> Drawn:
    """Errors by block: of the weights after each stage, of the states, and what tuning did."""
    drawn = [_weights(facts), _drift(facts), *_tuned(facts)]
    plots = [plot for some, _ in drawn for plot in some]
    return plots, "".join(text for _, text in drawn)


def _weights(facts: Facts) -> Drawn:
    blocks = by_block(facts.cells)
    names = [stage["use"] for stage in facts.settings.get("stage", [])]
    stages: dict[str, dict[int, float]] = {}
    for event in facts.stages:
        if "error" in event:
            name = names[event["stage"]]
            name += " again" if name in names[: event["stage"]] else ""
            stages.setdefault(name, {})[event["block"]] = event["error"]
    if not stages:
        stages[names[-1] if names else "all"] = {b: mean_error(x) for b, x in blocks.items()}
    series = [
        {"name": f"after {name}", "x": list(held), "y": list(held.values()), "dash": n % 4}
        for n, (name, held) in enumerate(stages.items())
    ]
    last = list(stages.values())[-1]
    if not last or not max(last.values()):
        return [], ""
    worst = max(last, key=lambda block: last[block])
    says = f"Relative squared error |W - Q|² / |W|²; largest in block {worst}: {last[worst]:.3g}."
    axes = "block", "relative squared error"
    return lines("weights", "Error of the weights", says, axes, series, height=280)


def _drift(facts: Facts) -> Drawn:
    found = {event["block"]: event["drift"] for event in facts.stages if "drift" in event}
    if len(found) < 2:
        return [], ""
    last = max(found)
    says = (
        "How far the hidden states are from the original's, as a share of their squared length; "
        f"behind block {last}: {found[last]:.3g}. All blocks up to there add to it."
    )
    series = [{"name": "behind the block", "x": list(found), "y": list(found.values())}]
    axes = "block", "relative squared distance"
    return lines("drift", "Drift of the hidden states", says, axes, series, height=280)


def _tuned(facts: Facts) -> list[Drawn]:
    """One plot for each stage that tunes: loss on windows held out, before and after."""
    stages: dict[str, list[dict[str, float]]] = {}
    for event in facts.tuned:
        stages.setdefault(event["stage"], []).append(event)
    found: list[Drawn] = []
    for number, (stage, held) in enumerate(stages.items()):
        before, after = (sum(x[key] for x in held) for key in ("start", "end"))
        says = f"Loss on held-out windows, all together: {before:.4g} before, {after:.4g} after."
        at = [x["block"] for x in held]
        series = [
            {"name": word, "x": at, "y": [x[key] for x in held], "dash": dash, "colour": dash}
            for word, key, dash in (("before", "start", 1), ("after", "end", 0))
        ]
        axes, title = ("block", "held-out loss"), f"Tuning by {stage}"
        found.append(lines(f"tuned{number}", title, says, axes, series, height=280))
    return found


def front(facts: Facts) -> Drawn:
    """The best plans of every size, and this run among them."""
    if facts.front is None or len(facts.front["points"]) < 2:
        return [], ""
    unit, points = facts.front["unit"], [x for x in facts.front["points"] if x[2] > 0]
    shown = [x for x in points if x[0] < MOST] or points
    series: list[Plot] = [
        {"name": "best plan of its size", "x": [x[0] for x in shown], "y": [x[2] for x in shown]}
    ]
    series[0]["hover"] = [[f"{x[0]:.4g} bits", f"{x[2]:.3g} {unit}", size(x[1])] for x in shown]
    held, says = facts.summary, "No plan of these candidates is better than these points."
    measured = (held.evaluation or {}).get("kl") if unit.startswith("nats") else None
    marks = [("this run, expected", held.expected_loss and held.expected_loss[0])]
    marks.append(("this run, measured KL", measured))
    for name, loss in marks:
        if loss:
            mark: Plot = {"name": name, "x": [held.bits], "y": [loss], "mode": "markers"}
            series.append(mark | {"large": True})
            says += f" {name[0].upper()}{name[1:]}: {loss:.3g} at {held.bits:.4g} bits."
    plot: Plot = {"id": "front", "kind": "lines", "x": BITS, "log": True, "series": series}
    plot["y"] = unit
    rows = [[f"{b:.4f}", size(n), f"{loss:.4g}", f"{noise:.2g}"] for b, n, loss, noise in points]
    data = table(["bits", "checkpoint", unit, "noise"], rows)
    return [plot], figure(plot, "Size against loss", says, data)


def phases(facts: Facts) -> Drawn:
    """Time and memory of the steps."""
    found = {key: value for key, value in facts.summary.phases.items() if value["seconds"] > 0}
    if not found:
        return [], ""
    spent, held = ([value[key] for value in found.values()] for key in ("seconds", "memory"))
    longest = max(found, key=lambda key: found[key]["seconds"])
    time: Plot = {"id": "time", "kind": "bars", "x": "seconds", "names": list(found)}
    time |= {"values": spent, "texts": [duration(x) for x in spent]}
    memory: Plot = {"id": "memory", "kind": "bars", "x": "MiB", "names": list(found)}
    memory |= {"values": [x / 2**20 for x in held], "texts": [size(x) for x in held]}
    rows = [
        [key, duration(x["seconds"]), size(x["memory"]), size(x.get("device", 0))]
        for key, x in found.items()
    ]
    data = table(["phase", "time", "memory", "GPU memory"], rows)
    share = found[longest]["seconds"] / sum(spent)
    left = figure(time, "Time", f"{longest} took {share:.0%} of it.", data)
    says = f"Resident memory when a unit of work ended, mapped files included: {size(max(held))}."
    right = figure(memory, "Memory", says, data)
    return [time, memory], f'<div class="pair">{left}{right}</div>'
