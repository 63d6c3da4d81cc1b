"""export_to: a finished checkpoint for another engine, and what it cannot hold, said beforehand."""

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aptq.export import Obstacle, Stored, exporters
from aptq.options import construct
from aptq.work import Report, Step, silent

SHOWN = 3  # layers that an error names for each reason


def export_to(
    folder: str | Path,
    out: str | Path,
    *,
    to: str,
    options: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> Path:
    """Write the run or checkpoint `folder` in the format `to` to the new path `out`.

    options: fields of the exporter.  Raises ValueError for a path that is taken, an unknown format
    or option, and with all layers that the format cannot hold, before anything is written.
    """
    exporter = construct(exporters.get(to.replace("-", "_")), dict(options or {}), f"--to {to}")
    target = Path(out)
    if target.exists() or not target.parent.is_dir():
        reason = "it exists" if target.exists() else "there is no such folder"
        raise ValueError(f"nothing can be exported there\n{target}: {reason}\nchoose another --out")
    stored = Stored.open(folder)
    refuse(to, exporter.check(stored.model, stored.checkpoint.plan))
    partial = target.with_name(target.name + ".partial")
    _remove(partial)  # of a run that was killed
    try:
        exporter.write(stored, partial, lambda done, total: report(Step("export", done, total)))
        partial.rename(target)
    finally:
        _remove(partial)
    return target


def refuse(to: str, obstacles: Sequence[Obstacle]) -> None:
    """Raise ValueError where there are obstacles: every reason with some of its layers."""
    if not obstacles:
        return
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in obstacles:
        reasons[one.why, one.instead].append(one.layer)
    lines = []
    for (why, _), layers in reasons.items():
        more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
        lines.append(f"{', '.join(layers[:SHOWN])}{more}: {why}")
    advice = "; ".join(dict.fromkeys(instead for _, instead in reasons))
    raise ValueError(f"{to} cannot hold this checkpoint\n" + "\n".join(lines) + f"\n{advice}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
