"""Compression throughput on one GPU: a random Llama of a 7B or 70B shape, 128 x 2048 tokens.

usage: python throughput.py --work FOLDER [--only 7b-gptq] [--blocks 8] [--phases]
Weights are written block by block, calibration ids are random.  A row holds the seconds of the
whole call (reading, compressing, writing), the median seconds of a block of every walk, what that
makes for all blocks of the real model, and the peaks of GPU and process memory beside the plan's
prediction.  --phases adds rows of a few blocks in which the device is waited for at the borders of
every phase, with the useful operations and bytes of each and the rates they make.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import shutil
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import psutil
import random_llama
import torch

GIB = 2**30
BF16, COPY = 790e12, 4.25e12  # of an H200, measured: dense FLOP/s; bytes/s read and written
PROTOCOL = "one process a row; whole call timed; random weights and tokens; int4-g128-z or 4.25bpw"


class Shape(NamedTuple):
    """What decides the cost of a Llama; `blocks` of the real model."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    blocks: int
    measured: int  # blocks that are compressed, unless --blocks says otherwise

    def linears(self) -> dict[str, tuple[int, int]]:
        kv = self.width // self.heads * self.kv_heads
        square, up = (self.width, self.width), (self.inner, self.width)
        found = {"self_attn.q_proj": square, "self_attn.k_proj": (kv, self.width)}
        found |= {"self_attn.v_proj": (kv, self.width), "self_attn.o_proj": square}
        found |= {"mlp.gate_proj": up, "mlp.up_proj": up}
        return found | {"mlp.down_proj": (self.width, self.inner)}

    def weights(self) -> int:
        """Of the linears of a block."""
        return sum(rows * columns for rows, columns in self.linears().values())


SHAPES = {
    "tiny": Shape(256, 512, 4, 2, 4, 2),  # to try the program itself
    "7b": Shape(4096, 11008, 32, 32, 32, 32),
    "70b": Shape(8192, 28672, 64, 8, 80, 2),
}
ROWS = [f"{shape}-{recipe}" for shape in ("7b", "70b") for recipe in ("gptq", "aptq")]
ROWS += ["7b-aptq-fast"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="local disk; 7b takes 13 GB")
    parser.add_argument("--only", nargs="*", default=[], help=f"of {', '.join(ROWS)}")
    parser.add_argument("--blocks", type=int, help="of the model that is compressed")
    parser.add_argument("--phases", action="store_true", help="waits at every phase; 3 blocks")
    parser.add_argument(
        "--peer",
        help="python with llm-compressor: its GPTQ, then ours, of the same model, in turns",
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", help="result file; default throughput-DEVICE")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def write_model(folder: Path, shape: Shape, blocks: int, device: str) -> Path:
    """A random model, one shard a block, unless a finished one is there."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    names: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}.safetensors"
        save_file({k: t.cpu() for k, t in tensors.items()}, folder / file, {"format": "pt"})
        names.update(dict.fromkeys(tensors, file))

    def normal(rows: int, columns: int) -> torch.Tensor:
        found = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return found.normal_(std=columns**-0.5, generator=generator)

    for index in range(blocks):
        block = {f"{name}.weight": normal(*size) for name, size in shape.linears().items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            block[f"{name}.weight"] = torch.ones(shape.width, dtype=torch.bfloat16)
        save(index, {f"model.layers.{index}.{name}": t for name, t in block.items()})
    outer = {"model.embed_tokens.weight": normal(32000, shape.width) * shape.width**0.5}
    outer |= {"lm_head.weight": normal(32000, shape.width)}
    save(blocks, outer | {"model.norm.weight": torch.ones(shape.width, dtype=torch.bfloat16)})
    LlamaConfig(
        vocab_size=32000,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    random_llama.write_tokenizer(folder)
    total = {"total_size": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": total, "weight_map": names}), encoding="utf-8")
    return folder


def recipe_of(name: str, options: argparse.Namespace) -> Any:
    """One grid, or for the recipes that choose 4.25 bits a weight."""
    from aptq.core.grid import Grid
    from aptq.recipe import Recipe

    ids = options.work / f"ids-{options.samples}x{options.length}.npy"
    if not ids.exists():
        count = options.samples * options.length
        np.save(ids, np.random.default_rng(0).integers(0, 32000, count, dtype=np.int32))
    recipe = Recipe.load(name)
    data = replace(recipe.data, source=str(ids), samples=options.samples, length=options.length)
    if recipe.allocate is not None:
        return replace(recipe, data=data, budget="4.25bpw")
    return replace(recipe, data=data, grids=(Grid.parse("int4-g128-z"),), budget="")


class Peaks:
    """Peak of the process's own memory while it is open, sampled; and of the GPU by walk."""

    def __init__(self, device: str) -> None:
        self.device, self.resident, self.open = device, 0, True
        self.walks, self.reserved = dict[str, int](), 0
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while self.open:
            info = process.memory_info()  # pages of mapped files are the system's to take back
            self.resident = max(self.resident, info.rss - info.shared)
            time.sleep(0.02)

    def __enter__(self) -> Peaks:
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()

    def now(self, walk: str) -> None:
        """What was allocated since the last call was for `walk`."""
        if self.device.startswith("cuda"):
            self.walks[walk] = max(self.walks.get(walk, 0), torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def row(self) -> common.Row:
        found: common.Row = {"peak_ram_gib": round(self.resident / GIB, 2)}
        if self.device.startswith("cuda"):
            self.now("end")
            found["peak_gpu_gib"] = round(max(self.walks.values()) / GIB, 2)
            found["walks_gib"] = {name: round(n / GIB, 2) for name, n in self.walks.items()}
            found["reserved_gpu_gib"] = round(self.reserved / GIB, 2)
        return found


class Phases:
    """Own seconds of functions, the device waited for before and after each call."""

    TIMED = (
        ("load", "aptq.model.model", "Model", "load"),
        ("observe", "aptq.engine.block", "Block", "_observe"),
        ("advance", "aptq.engine.stream", "Stream", "advance"),
        ("original inputs", "aptq.engine.origin", "Origin", "inputs"),
        ("hessian", "aptq.stats.hessian", "Hessian", "update"),
        ("drift", "aptq.stats.hessian", "Hessian", "_add_drift"),
        ("factor", "aptq.stats.hessian", "Hessian", "factor"),
        ("correction", "aptq.stats.hessian", "Hessian", "correction"),
        ("fit", "aptq.methods.quantize.gptq", "", "fit"),
        ("sweep", "aptq.methods.quantize.gptq", "", "sweep"),
        ("damage", "aptq.methods.measure.fisher", "", "row_damage"),
        ("descent", "aptq.methods.quantize.descent", "", "descend"),
        ("backward", "aptq.engine.backward", "Observed", "_run"),
        ("pack", "aptq.methods.quantize.gptq", "", "part_of"),
        ("write", "aptq.store.checkpoint", "Writer", "write_block"),
    )

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inside: list[float] = []  # seconds of calls within each open one
        for phase, module, owner, name in self.TIMED:
            place: Any = importlib.import_module(module)
            place = getattr(place, owner) if owner else place
            setattr(place, name, self._timed(phase, getattr(place, name)))

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = self._now() - start
                self.seconds[phase] += spent - self.inside.pop()
                self.calls[phase] += 1
                if self.inside:
                    self.inside[-1] += spent

        return call


def work_of(shape: Shape, tokens: int, measured: int) -> dict[str, tuple[float, float]]:
    """(useful FLOP, bytes that must move) of a block by phase, of one recipe pass each."""
    sizes, weights = shape.linears(), shape.weights()
    inputs = [shape.width, shape.width, shape.width, shape.inner]
    forward = 2 * tokens * weights
    square = sum(n**2 for n in inputs)
    cube = sum(n**3 for n in inputs)
    push = sum(rows * n**2 for rows, n in sizes.values())
    return {
        "load": (0, 2 * weights),
        "advance": (forward, 2 * weights),
        "observe": (forward, 2 * weights),
        "original inputs": (forward, 2 * weights),
        "hessian": (tokens * square, 2 * tokens * sum(inputs)),
        "drift": (2 * tokens * square, 4 * tokens * sum(inputs)),
        "factor": (2 / 3 * cube, 8 * square),
        "correction": (7 / 3 * cube, 8 * square),
        "sweep": (push, 12 * weights),
        "fit": (0, 4 * weights),
        "damage": (2 * push, 8 * weights),
        "backward": (6 * measured * weights, 2 * weights),
    }


def compress(row: str, options: argparse.Namespace) -> common.Row:
    from aptq import pipeline
    from aptq.work import Step

    shape_name, recipe_name = row.split("-", 1)
    shape = SHAPES[shape_name]
    blocks = options.blocks or (min(3, shape.measured) if options.phases else shape.measured)
    folder = options.work / f"{shape_name}-{blocks}"
    start = time.perf_counter()
    model = write_model(folder, shape, blocks, options.device)
    written = time.perf_counter() - start
    recipe, out = recipe_of(recipe_name, options), options.work / "run"
    shutil.rmtree(out, ignore_errors=True)
    plan = pipeline.outlook(model, recipe, device=options.device).single().effort
    phases = Phases(options.device) if options.phases else None
    ends: dict[str, list[float]] = defaultdict(list)
    lines: list[str] = []

    peaks = Peaks(options.device)

    def report(event: Step | str) -> None:
        if isinstance(event, Step):
            peaks.now(event.phase)
            ends[event.phase].append(time.perf_counter())
        else:
            lines.append(event.replace(f"{options.work}/", ""))

    with peaks:
        start = time.perf_counter()
        pipeline.compress(model, out, recipe=recipe, device=options.device, report=report)
        seconds = time.perf_counter() - start
    shutil.rmtree(out)
    medians = {
        phase: statistics.median(b - a for a, b in itertools.pairwise(times))
        for phase, times in ends.items()
        if len(times) > 2
    }
    block = sum(medians.values())
    found = {"blocks": blocks, "tokens": options.samples * options.length, "written_s": written}
    found |= {"seconds": seconds, "block_s": block, "walks_s": medians}
    found |= {"extrapolated_s": seconds + (shape.blocks - blocks) * block, "lines": lines}
    found |= peaks.row() | {"predicted_gib": plan.memory / GIB, "predicted_s": plan.seconds}
    found["predicted_parts_gib"] = {k: round(v / GIB, 2) for k, v in plan.parts.items()}
    if phases is not None:
        found["phases"] = rates(phases, shape, options, blocks)
    return found


def rates(
    phases: Phases, shape: Shape, options: argparse.Namespace, blocks: int
) -> dict[str, common.Row]:
    """Seconds of a block by phase, and what one pass of it makes of the device."""
    tokens = options.samples * options.length
    known, found = work_of(shape, tokens, min(tokens, 16384)), {}
    for phase, spent in sorted(phases.seconds.items(), key=lambda item: -item[1]):
        one = {"seconds": spent / blocks, "calls": phases.calls[phase] / blocks}
        flop, nbytes = known.get(phase, (0, 0))
        # every candidate of a layer is fitted, swept (several in one call) and judged
        counted = {"fit": "fit", "damage": "damage", "sweep": "fit"}.get(phase)
        times = phases.calls[counted] / blocks / len(shape.linears()) if counted else 1.0
        if flop:
            one["tflops"] = flop * times * blocks / spent / 1e12
            one["share_of_peak"] = flop * times * blocks / spent / BF16
        if nbytes:
            one["gbps"] = nbytes * times * blocks / spent / 1e9
            one["share_of_copy"] = nbytes * times * blocks / spent / COPY
        found[phase] = one
    return found


def peer(row: str, options: argparse.Namespace) -> common.Row:
    """Seconds of llm-compressor's GPTQ for the model of a row; it saves nothing."""
    shape = SHAPES[row.split("-", 1)[0]]
    blocks = options.blocks or shape.measured
    model = write_model(
        options.work / f"{row.split('-')[0]}-{blocks}", shape, blocks, options.device
    )
    report = options.work / "peer.json"
    call = [options.peer, str(common.REPOSITORY / "benchmarks/peers/llm_compressor.py"), str(model)]
    # its tokens are the bytes of a text, as many as ours
    call += ["--text", str(common.SHARED / "data/c4_calibration.txt"), "--group", "128"]
    call += ["--samples", str(options.samples), "--length", str(options.length)]
    done = subprocess.run(
        [*call, "--device", "cuda", "--json", str(report)], text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])
    found = json.loads(report.read_text("utf-8"))
    seconds = found["seconds"]["oneshot"]
    return {
        "blocks": blocks,
        "tokens": options.samples * options.length,
        "seconds": seconds,
        "peak_gpu_gib": found["peak_cuda_bytes"] / GIB,
        "versions": found["versions"],
        "ours": False,
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return value


def main() -> None:
    options = arguments()
    kind = options.device.split(":")[0]
    results = common.Results.open(
        options.name or f"throughput-{kind}",
        device=options.device,
        protocol=PROTOCOL,
        folder=options.results,
    )
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.only or ROWS:
        blocks = f", {options.blocks} blocks" if options.blocks else ""
        label = f"{name}{blocks}{', phases' if options.phases else ''}"
        if results.find({"label": label}):
            print(f"{label}: there", flush=True)
            continue
        if options.peer:
            row = {"label": f"llm-compressor of {label}"} | rounded(peer(name, options))
            results.append(row)
            print(json.dumps(row), flush=True)
            label += ", beside llm-compressor"
        row = {"label": label} | rounded(compress(name, options))
        results.append(row)
        print(json.dumps(row), flush=True)
        if options.phases:
            break  # functions stay wrapped: one such row a process


if __name__ == "__main__":
    main()
