"""Which tile a kernel takes: from the file of a device that was tuned, else by rule.

Nothing is ever timed inside a product; `tune` is called by benchmarks/kernels.py --tune.
"""

import json
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from aptq.kernels.triton.layout import Buffers, Layout

VERSION = 3  # of the file; kernels that work in another way need other tiles
SHARED = 160 << 10  # bytes of shared memory for one program: what an A100 has, an H100 has 227
MEMORY = 227 << 10  # bytes of shared memory of a processor that the rule was timed on
ROTATED = 256 << 20  # bytes of weights that are timed in turn: more than second-level caches hold
WARPS = {16: (1,), 32: (1, 2), 64: (1, 2, 4), 128: (2, 4, 8)}  # of a tile, by its rows


class Setting(NamedTuple):
    """One tile: rows of the weight and of x, warps, stages of loads, parts of a row's sum."""

    rows: int
    batch: int
    warps: int
    stages: int
    splits: int

    def held(self, layout: Layout) -> int:
        """Bytes of shared memory for loads in flight."""
        # the matrix units that read x where it was loaded
        wide = self.rows >= 64 and self.batch >= 16 and self.warps % 4 == 0
        weights = self.rows * layout.bits // 8 * (self.stages - 1)
        return layout.block * (weights + 2 * self.batch * (self.stages - (not wide)))

    def fits(self, layout: Layout) -> bool:
        """Do loads in flight fit into shared memory, sums into registers, has each part a block?"""
        sums = self.rows * self.batch // (32 * self.warps)
        blocks = -(-layout.columns // layout.block)
        return self.held(layout) <= SHARED and sums <= 32 and self.splits <= blocks


def batch_of(rows: int) -> int:
    """Columns of the tile for so many rows of x: 8 (the matrix instruction's least) to 64."""
    return min(64, max(8, 1 << (rows - 1).bit_length()))


@cache
def chosen(layout: Layout, rows: int, device: torch.device) -> Setting:
    """The setting for `rows` rows of x.  Raises nothing: a file that is damaged is not used."""
    if device.type != "cuda":
        return default(layout, rows, 1)
    known = settings(file_of(torch.cuda.get_device_name(device)))
    found = known.get(key_of(layout, rows))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return found if found and found.fits(layout) else default(layout, rows, processors)


def default(layout: Layout, rows: int, processors: int) -> Setting:
    """By a rule that an H200 was timed for: two programs and a bit for each processor."""
    batch, whole, few = batch_of(rows), layout.units == 1, batch_of(rows) <= 16
    # many rows of the weight: wider tiles read x less often; 3 bits and such need it sooner
    large = layout.out >= (96 if few else 128 if whole else 40) * processors
    long = layout.columns > 8192 and not (few and large)
    if few:
        size, warps = (64, 2) if large else (32, 1) if long else (32 if whole else 64, 2)
        quarters = 5 + 4 * whole if large else 9 + (7 if long else 3) * whole
    else:
        # 8 bits are two products: where tiles of 128 fill the processors, fewer but larger ones
        fills = layout.bits == 8 and 24 * processors < layout.out <= 32 * processors
        narrow = batch <= 32 or not whole  # of 64 rows of x whole units want small tiles
        size, quarters = 128 if large or (narrow and (long or fills)) else 64, 5 + whole
        warps = 8 if size * batch > 4096 else 4
    tiles, splits, wanted = -(-layout.out // size), 1, processors * quarters // 4
    while tiles * splits < wanted and splits < 8 and 2 * splits * layout.block <= layout.columns:
        splits *= 2
    stages = 3 if whole or (few and (large or long)) else 2
    setting = Setting(size, batch, warps, stages, splits)
    # as many programs as a processor gets should run there at once
    most = MEMORY // -(-tiles * splits // processors) if batch <= 32 or not whole else SHARED
    while setting.stages > 2 and (setting.held(layout) > most or not setting.fits(layout)):
        setting = setting._replace(stages=setting.stages - 1)
    return setting


def candidates(layout: Layout, rows: int, processors: int) -> list[Setting]:
    """Settings worth timing: between half a program and sixteen for each processor."""
    sizes = [(size, warps) for size, many in WARPS.items() for warps in many]
    found = []
    for (size, warps), stages, splits in product(sizes, (2, 3, 4, 6), (1, 2, 4, 8)):
        setting = Setting(size, batch_of(rows), warps, stages, splits)
        programs = -(-layout.out // size) * splits
        if setting.fits(layout) and processors <= 2 * programs <= 32 * processors:
            found.append(setting)
    return found


def key_of(layout: Layout, rows: int) -> str:
    """What a tuned setting holds for: sizes count by the next power of two."""
    shape = "x".join(str(1 << (size - 1).bit_length()) for size in layout[:2])
    group = f"g{layout.group}" if layout.group else "row"
    return f"int{layout.bits}-{group}-c{layout.chunk}-z{layout.zero} {shape} b{batch_of(rows)}"


def file_of(device: str) -> Path:
    """Where the settings of a device lie: in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "aptq" / "kernels" / f"{device.replace(' ', '-').replace('/', '-')}.json"


@cache
def settings(file: Path) -> dict[str, Setting]:
    """What the file holds; nothing, with a warning, where it is not what `save` writes."""
    if not file.exists():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            return {}
        return {str(key): _setting(values) for key, values in data["settings"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"tuned kernels were not used\n{file}: {error}\nremove the file and tune again",
            stacklevel=2,
        )
        return {}


def _setting(values: Sequence[int]) -> Setting:
    """Checked: a setting from elsewhere may not reach the compiler."""
    setting = Setting(*values)
    powers = all(type(n) is int and n > 0 for n in setting)
    if not powers or setting.warps not in WARPS.get(setting.rows, ()) or setting.stages > 8:
        raise ValueError(f"no setting: {values!r}")
    return setting


def save(file: Path, found: dict[str, Setting]) -> None:
    """Add to the file, in one step."""
    settings.cache_clear()
    merged = settings(file) | found
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"version": VERSION, "settings": merged}, indent=1), "utf-8")
    partial.replace(file)
    settings.cache_clear()
    chosen.cache_clear()


def random_buffers(
    layout: Layout, device: torch.device, scale: torch.dtype = torch.float16
) -> Buffers:
    """Random codes and scales for timing; no product of them is infinite."""
    groups = 1
    if layout.group:
        groups = -(-layout.columns // layout.group)
    codes = torch.randint(-(1 << 15), 1 << 15, (layout.size,), dtype=torch.int16, device=device)
    factors = torch.rand(groups, layout.padded, device=device) * 0.02 + 0.001
    levels = torch.randint(0, 1 << layout.bits, factors.shape, device=device)
    zero = None if not layout.zero else levels.to(torch.uint8 if layout.zero == 1 else scale)
    counts = codes.new_zeros(layout.counters, dtype=torch.int32)
    return Buffers(codes, counts, factors.to(scale), zero)


def seconds(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Median seconds of one call, on the GPU: one graph of all calls, at least 32, replayed."""
    calls = [*calls] * -(-32 // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def times(
    layout: Layout, rows: int, dtype: torch.dtype, device: torch.device, wanted: Sequence[Setting]
) -> dict[Setting, float]:
    """Seconds of a product with each setting, the weights in turn as in a model."""
    from aptq.kernels.triton.launch import run

    copies = max(2, min(64, -(-ROTATED // layout.nbytes)))
    held = [random_buffers(layout, device) for _ in range(copies)]
    x = torch.randn(rows, layout.columns, dtype=dtype, device=device)
    return {
        setting: seconds([lambda b=b, s=setting: run(x, *b, None, layout, s) for b in held])
        for setting in wanted
    }


def tune(
    layout: Layout, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[Setting, float]:
    """Time all candidates on `device`, keep the fastest for later; seconds of each, best first."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = {default(layout, rows, processors), *candidates(layout, rows, processors)}
    timed = times(layout, rows, dtype, device, sorted(wanted))
    found = dict(sorted(timed.items(), key=lambda item: item[1]))
    save(file_of(torch.cuda.get_device_name(device)), {key_of(layout, rows): next(iter(found))})
    return found
