"""Products with packed weights on a GPU beside bf16 (cuBLAS) and torch's int4, in one process.

usage: python kernels.py [--tune] [--only TEXT ...]
Every row is a grid and a shape at batch 1, 8, 32 and 64; "prefill" rows compare, from 64 rows on,
the packed product with decoding the weight first, which is where layer.ROWS comes from.  "tune"
rows, with --tune, hold the seconds of every setting, which is where tuning.default comes from.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import torch
from torch.nn import functional as F

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TUNED = (*SHAPES, (1024, 4096), (14336, 4096))
GRIDS = tuple(f"int{bits}-g128" for bits in (4, 3, 2, 5, 6, 8))
MORE = ("int4-g128-z", "int4-g32", "int4-g64-fz", "int4-row", "int3-g64-z")  # one shape only
BATCHES = (1, 8, 32, 64)
PREFILL = (64, 128, 192, 256, 384, 512, 1024)
ROTATED = 256 << 20  # bytes of weights in turn: more than four times an H200's L2
PROTOCOL = (
    "median microseconds of a call: CUDA graph of at least 32 calls over weights of more than "
    "256 MiB in turn, 7 replays; share = (stored weight + x + y) / time / bandwidth of a "
    "kernel that copies 4 GiB, both directions counted; bf16 activations"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tune", action="store_true", help="first time all tiles and keep the best"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="for --tune")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile for --tune")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="rows whose label holds one of these texts"
    )
    parser.add_argument("--name", default="kernels-cuda")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def chosen(label: str, options: argparse.Namespace) -> bool:
    """Is the row asked for?"""
    return any(text in label for text in options.only)


def copies(nbytes: int) -> range:
    return range(max(2, min(64, -(-ROTATED // nbytes))))


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written ones."""
    from aptq.kernels.triton.tuning import seconds

    source = torch.zeros(1 << 30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    # a sum, for a plain copy would go to the copy engine, which is slower
    return 2 * source.nbytes / seconds([lambda: torch.add(source, 1, out=target)])


def dense_calls(shape: tuple[int, int], x: torch.Tensor) -> list[Callable[[], object]]:
    out, columns = shape
    held = [torch.randn(shape, device="cuda").bfloat16() for _ in copies(2 * out * columns)]
    return [lambda w=w: F.linear(x, w) for w in held]


def torch_calls(shape: tuple[int, int], x: torch.Tensor) -> list[Callable[[], object]]:
    out, columns = shape
    calls = []
    for _ in copies(out * columns // 2):
        codes = torch.randint(0, 255, (out, columns // 2), dtype=torch.uint8, device="cuda")
        packed = torch._convert_weight_to_int4pack(codes, 8)
        affine = torch.rand(columns // 128, out, 2, device="cuda").bfloat16() * 0.01
        calls.append(lambda p=packed, a=affine: torch._weight_int4pack_mm(x, p, 128, a))
    return calls


def packed_layers(text: str, shape: tuple[int, int]) -> list:
    """Kernels with random codes, as many as the cache cannot hold."""
    from aptq.core.grid import Grid
    from aptq.kernels.triton.layer import Fused
    from aptq.kernels.triton.layout import layout_of
    from aptq.kernels.triton.tuning import random_buffers

    layout, held = layout_of(Grid.parse(text), shape), []
    for _ in copies(layout.nbytes):
        kernel = Fused.__new__(Fused)
        torch.nn.Module.__init__(kernel)
        kernel.shape, kernel.layout, kernel.left, kernel.right = shape, layout, None, None
        for name, tensor in random_buffers(layout, torch.device("cuda"))._asdict().items():
            kernel.register_buffer(name, tensor, persistent=False)
        held.append(kernel)
    return held


def bytes_of(text: str, shape: tuple[int, int], batch: int) -> int:
    from aptq.core.grid import Grid

    grid = "int4-g128-bf16" if text == "torch int4" else text
    return Grid.parse(grid).nbytes(shape) + 2 * batch * sum(shape)


def measure(text: str, shape: tuple[int, int], bandwidth: float) -> common.Row:
    """Microseconds and share of the copy's bandwidth at every batch."""
    from aptq.kernels.triton.tuning import chosen as setting_of
    from aptq.kernels.triton.tuning import seconds

    row: common.Row = {"microseconds": [], "share": [], "settings": []}
    held = packed_layers(text, shape) if text.startswith("int") else []
    for batch in BATCHES:
        x = torch.randn(batch, shape[1], device="cuda").bfloat16()
        if held:
            calls = [lambda k=kernel, x=x: k(x) for kernel in held]
            row["settings"].append(list(setting_of(held[0].layout, batch, x.device)))
        else:
            calls = (dense_calls if text == "bf16" else torch_calls)(shape, x)
        with torch.inference_mode():
            took = seconds(calls)
        row["microseconds"].append(round(1e6 * took, 2))
        row["share"].append(round(bytes_of(text, shape, batch) / took / bandwidth, 3))
    return row


def prefill(text: str, shape: tuple[int, int]) -> common.Row:
    """Microseconds of the packed product, of decoding and multiplying, and of bf16."""
    from aptq.kernels.triton import launch
    from aptq.kernels.triton.tuning import seconds

    row: common.Row = {"rows": list(PREFILL), "packed": [], "decoded": [], "bf16": []}
    held = packed_layers(text, shape)
    layout = held[0].layout

    def packed(kernel: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        held = (kernel.codes, kernel.counts, kernel.scale, kernel.zero, None)
        return launch.multiply(x, *held, layout)

    def decoded(kernel: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        storage = (kernel.codes, kernel.scale, kernel.zero, layout)
        return F.linear(x, launch.expand(x, *storage, 0, shape[0]))

    for batch in PREFILL:
        x = torch.randn(batch, shape[1], device="cuda").bfloat16()
        with torch.inference_mode():
            for call in (packed, decoded):
                calls = [lambda k=kernel, x=x, call=call: call(k, x) for kernel in held]
                row[call.__name__].append(round(1e6 * seconds(calls), 1))
            row["bf16"].append(round(1e6 * seconds(dense_calls(shape, x)), 1))
    return row


def compile_settings(text: str, batch: int, wanted: list[tuple[int, ...]]) -> None:
    """Fill the compiler's cache, in a process of its own."""
    from aptq.core.grid import Grid
    from aptq.kernels.triton.launch import run
    from aptq.kernels.triton.layout import layout_of
    from aptq.kernels.triton.tuning import Setting, random_buffers

    layout = layout_of(Grid.parse(text), SHAPES[1])
    held = random_buffers(layout, torch.device("cuda"))
    x = torch.randn(batch, layout.columns, device="cuda").bfloat16()
    for setting in wanted:
        run(x, *held, None, layout, Setting(*setting))


def compile_all(texts: list[str], options: argparse.Namespace) -> None:
    """What tuning these grids will time."""
    from aptq.core.grid import Grid
    from aptq.kernels.triton.layout import layout_of
    from aptq.kernels.triton.tuning import batch_of, candidates, default

    jobs = []
    for text in texts:
        for batch in sorted({batch_of(batch) for batch in options.batches}):
            layouts = [layout_of(Grid.parse(text), shape) for shape in TUNED]
            found = {s for how in layouts for s in candidates(how, batch, 132)}
            found |= {default(how, batch, 132) for how in layouts}
            # the number of splits is not compiled in, only whether there are any
            some = sorted({s._replace(splits=min(s.splits, 2)) for s in found})
            jobs += [(text, batch, [tuple(s) for s in some[i::4]]) for i in range(4)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        for done in [pool.submit(compile_settings, *job) for job in jobs]:
            done.result()


def tune(text: str, shape: tuple[int, int], batches: Iterable[int]) -> common.Row:
    """Microseconds of every setting by batch, best first; the best is used from now on."""
    from aptq.core.grid import Grid
    from aptq.kernels.triton.layout import layout_of
    from aptq.kernels.triton.tuning import batch_of, default, tune

    layout = layout_of(Grid.parse(text), shape)
    device = torch.device("cuda", torch.cuda.current_device())
    row: common.Row = {"timed": {}, "default": {}}
    for batch in sorted({batch_of(batch) for batch in batches}):
        found = tune(layout, batch, torch.bfloat16, device)
        rule = default(layout, batch, torch.cuda.get_device_properties(0).multi_processor_count)
        row["timed"][batch] = [[round(1e6 * took, 2), *how] for how, took in found.items()]
        row["default"][batch] = round(1e6 * found[rule], 2)
    return row


def main() -> None:
    options = arguments()
    results = common.Results.open(
        options.name, device="cuda", protocol=PROTOCOL, folder=options.results
    )
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    wanted = [("bf16", shape) for shape in SHAPES] + [("torch int4", shape) for shape in SHAPES]
    wanted += [(text, shape) for text in GRIDS for shape in SHAPES]
    wanted += [(text, SHAPES[2]) for text in MORE]
    wanted += [(f"prefill {text}", SHAPES[2]) for text in ("int4-g128", "int3-g128")]
    if options.tune:
        tuned = [(f"tune {text}", shape) for text in (*GRIDS, *MORE) for shape in TUNED]
        tuned = [(text, (a, b)) for text, (a, b) in tuned if chosen(f"{text} {a}x{b}", options)]
        compile_all(sorted({text.split()[1] for text, _ in tuned}), options)
        wanted = tuned + wanted
    for text, shape in wanted:
        row: common.Row = {"label": f"{text} {shape[0]}x{shape[1]}"}
        if not chosen(row["label"], options) or results.find(row) is not None:
            continue
        kind, _, grid = text.rpartition(" ")
        if kind == "prefill":
            row |= prefill(grid, shape)
        elif kind == "tune":
            row |= tune(grid, shape, options.batches)
        else:
            row |= {"batches": list(BATCHES), "copy_bandwidth": round(bandwidth / 1e12, 3)}
            row |= measure(text, shape, bandwidth)
        results.append(row)
        shown = {key: value for key, value in row.items() if key not in ("settings", "batches")}
        if kind == "tune":
            shown["timed"] = {batch: best[:3] for batch, best in row["timed"].items()}
        print(shown, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
