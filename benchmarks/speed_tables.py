"""Tables of what a GPU was timed at, for tables.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], list[list[str]]]


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def kernels(result: dict[str, Any]) -> Table:
    """Microseconds by batch, and the share of the copy's bandwidth at batch 1."""
    lines = []
    for row in result["rows"]:
        if "microseconds" in row:
            times = [number(value, 1) for value in row["microseconds"]]
            lines.append([row["label"], *times, number(row["share"][0], 2)])
    batches = next(row["batches"] for row in result["rows"] if "batches" in row)
    names = [f"batch {batch}, us" for batch in batches]
    return ("grid and shape", *names, "share of copy at batch 1"), lines


def prefill(result: dict[str, Any]) -> Table:
    """Microseconds by rows of x: packed, decoded first, bf16."""
    rows = [row for row in result["rows"] if "packed" in row]
    lines = [
        [f"{row['label']}: {kind}", *(number(value, 0) for value in row[kind])]
        for row in rows
        for kind in ("packed", "decoded", "bf16")
    ]
    return ("product", *(f"{count} rows" for count in rows[0]["rows"])), lines


def decode(result: dict[str, Any]) -> Table:
    lines = []
    for row in result["rows"]:
        cells = [number(row["tokens_per_second"], 1), number(row["milliseconds"], 2)]
        cells += [number(row["memory_gib"], 2), number(row["ratio_to_bf16"], 2)]
        lines.append([row["label"], *cells])
    return ("model", "tokens/s", "ms a step", "GiB", "ratio to bf16"), lines


def throughput(result: dict[str, Any]) -> Table:
    """Seconds of whole calls, and the GPU's peaks beside what was planned."""
    lines = []
    for row in result["rows"]:
        rate = row["tokens"] / row["seconds"]
        cells = [str(row["blocks"]), number(row["seconds"], 1), number(row.get("block_s"), 2)]
        cells += [number(row.get("extrapolated_s"), 0), number(rate, 0)]
        cells += [number(row.get(key), 2) for key in ("peak_gpu_gib", "predicted_gib")]
        lines.append([row["label"], *cells])
    names = ("run", "blocks", "seconds", "s a block", "s for all blocks", "tokens/s")
    return (*names, "peak GiB", "planned GiB"), lines


def phases(result: dict[str, Any]) -> Table:
    """Where the time of a block goes, and at what rates."""
    lines = []
    for row in result["rows"]:
        for name, one in row.get("phases", {}).items():
            cells = [number(one["seconds"], 3), number(one["calls"], 1)]
            cells += [number(one.get("tflops"), 1), number(one.get("gbps"), 1)]
            lines.append([row["label"].partition(",")[0], name, *cells])
    return ("run", "phase", "s a block", "calls a block", "TFLOP/s", "GB/s"), lines
