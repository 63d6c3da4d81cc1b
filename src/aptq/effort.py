"""What compressing will take: memory, disk and time, from shapes and the recipe.

Memory and disk add up what the steps hold at once; the seconds divide counted operations by the
rates below, so they are right within a factor of two at best.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aptq.core.plan import Plan
from aptq.core.stack import ROW_BYTES
from aptq.engine.stage import Stage
from aptq.engine.stream import batch_windows, stack_bytes
from aptq.model.model import Model
from aptq.planning import (
    candidates,
    kept_tokens,
    measuring_bytes,
    measuring_data,
    moving,
    wants_profiles,
    wants_scores,
)
from aptq.recipe import Recipe
from aptq.stats.ahead import FEWEST, ahead_count

PROGRAM = 300 << 20  # bytes of anonymous memory after the imports, tokenizer included (measured)
HOST = 1500 << 20  # the same at the end of a run on a GPU, with CUDA's libraries: 1.35 to 1.62 GiB
FACTOR = 32  # bytes for each element of a Hessian while it is factorised: its mean, float64 copies
# the same on a GPU, by what the code holds: float32 copies; where it makes up for drift four in
# float64 beside mean and factor; and what is left of them while columns are rounded; right within
# 4 % for the peaks in benchmarks/results/throughput-cuda.json
DEVICE_FACTOR, CORRECTION, LEFT = 22, 44, 12
# where experts are factored ahead: for an element of one that waits, and of one that is made (by
# what the code holds, not measured)
WAITING, BATCH = 8, 20
# while candidates are measured, of a Hessian's elements and of a candidate's weights: fitted there
MEASURING, CANDIDATE = 35, 24
SWEEP = 16  # bytes a weight while a layer is rounded: residual, errors, result, codes
BLOCK = 6  # bytes a weight of the loaded block: float32 to work on, 16 bits to run


@dataclass(frozen=True, slots=True)
class Rates:
    """Sustained speed of a device."""

    forward: float  # FLOP/s of 16-bit products
    solve: float  # FLOP/s of factorising and of column sweeps
    column: float  # seconds to launch what a sweep does for one column
    stream: float  # bytes/s read, hashed and written


# Fitted to benchmarks/results: compress_time-cpu and memory-cpu (one core of two with
# AVX512_BF16); the GPU's are counted for an H200: products of 16 and of 32 bits, and a launch and a
# small product for every 64 columns
CPU_CORE = Rates(forward=120e9, solve=15e9, column=0.0, stream=0.5e9)
GPU = Rates(forward=400e12, solve=25e12, column=1e-6, stream=1e9)


@dataclass(frozen=True, slots=True)
class Effort:
    """Needs of a run.  `memory` is on the device that compresses; mapped weights do not count."""

    memory: int  # bytes at the peak
    disk: int  # bytes at the peak, if the hidden states lie there
    seconds: float  # an estimate
    parts: dict[str, int]  # what the memory holds
    host: int = 0  # bytes of RAM beside, on a GPU: the program, and the next block read ahead


def effort(model: Model, recipe: Recipe, plan: Plan, nbytes: int, device: torch.device) -> Effort:
    """What `aptq compress` needs for a checkpoint of `nbytes` bytes under `plan`."""
    calibrated = any(stage.reads for stage in recipe.stages)
    tokens = recipe.data.needed if calibrated else 0
    measured = wants_scores(recipe, None)
    backward = measured or wants_profiles(recipe)
    some = measuring_data(recipe.data).needed if backward else 0
    width: int = model.config.get_text_config().hidden_size
    states = kept_tokens(recipe) * width * model.dtype.itemsize if calibrated else 0
    tape = measuring_bytes(model, recipe, measured) if backward else 0
    parts = _memory(model, recipe, plan, device)
    parts["hidden states"] = states
    if device.type == "cuda":
        if any(stage.original for stage in recipe.stages):
            # what the next block of the original gets
            parts["hidden states"] += tokens * width * model.dtype.itemsize
        before = _measuring(model, recipe, plan, device, tape) if measured else {}
        parts = max(parts, before, key=lambda found: sum(found.values()))
    ahead = model.dtype.itemsize * max(_weights(model))
    return Effort(
        memory=sum(parts.values()),
        disk=nbytes + max(states, tape),
        seconds=_seconds(model, recipe, plan, nbytes, tokens, some, device),
        parts=parts,
        host=HOST + ahead if device.type == "cuda" else 0,
    )


def _memory(model: Model, recipe: Recipe, plan: Plan, device: torch.device) -> dict[str, int]:
    """Bytes by what they are for, at the block that takes most."""
    gpu = device.type == "cuda"
    blocks = [_block(model, recipe, plan, index, device) for index in range(model.blocks)]
    largest = max(blocks, key=lambda block: sum(block.values()))
    parts = {**({} if gpu else {"program": PROGRAM}), **largest}
    config = model.config.get_text_config()
    length = recipe.data.length
    rows = min(batch_windows(length, device) * length, recipe.data.needed)
    inner = max(max(shape) for shape in model.shapes.values())
    parts["activations of a batch"] = rows * (4 * config.hidden_size + 3 * inner)
    parts["activations of a batch"] *= model.dtype.itemsize
    parts["tuning"] = round(max(stage.tuning * _tuned(model, stage) for stage in recipe.stages))
    outer = sum(math.prod(shape) for shape in model.outer_shapes.values())
    if gpu:  # on a CPU they are mapped from the source
        parts["embedding and head"] = outer * model.dtype.itemsize
        _on_gpu(parts, model, recipe, plan, rows * model.dtype.itemsize, device)
    return parts


def _on_gpu(
    parts: dict[str, int],
    model: Model,
    recipe: Recipe,
    plan: Plan,
    row: int,
    device: torch.device,
) -> None:
    """Correct the parts for what a GPU does otherwise; row: bytes of a batch for each column."""
    wide = max(shape[1] for shape in model.shapes.values())
    drifts = any(stage.original for stage in recipe.stages)
    if parts["factorisation"]:
        most, left = (CORRECTION, LEFT + 4) if drifts else (DEVICE_FACTOR, LEFT)
        held = _ahead(model, plan, device)
        found = [(BATCH * held, 0)]
        for shapes in _rounded(model, plan):
            square = shapes[0][1] ** 2
            swept = ROW_BYTES * together(shapes, device)
            # one follows the other
            alone = most * square > left * square + swept
            found.append((most * square, 0) if alone else (left * square, swept))
            found[-1] = (found[-1][0] + WAITING * held, found[-1][1])
        parts["factorisation"], parts["rounding"] = max(found, key=sum)
        # three in the feed-forward part, the residual and what is normed: within 1 % of a 7B
        # model's; inputs of four groups of layers, the original's and the block's, wait with drift
        hidden = model.config.get_text_config().hidden_size
        waiting = 2 * (3 * hidden + wide) if drifts else 0
        parts["activations of a batch"] = row * (3 * wide + 2 * hidden + waiting)
    first, second = ("factorisation", "rounding"), ("activations of a batch",)
    total = [sum(parts[name] for name in names) for names in (first, second)]
    for name in second if total[0] > total[1] else first:
        parts[name] = 0  # the others are there at another time, and larger


def _measuring(
    model: Model, recipe: Recipe, plan: Plan, device: torch.device, tape: int
) -> dict[str, int]:
    """Bytes on a GPU while all candidates of a layer are tried, in the walk before the other."""
    found = []
    for shapes in _rounded(model, plan):
        numel = max(math.prod(shape) for shape in shapes)
        most = max(1, stack_bytes(device) // (ROW_BYTES * numel))  # candidates swept together
        tries = min(len(candidates(recipe)), most)
        found.append((MEASURING * shapes[0][1] ** 2, CANDIDATE * numel * tries))
    parts = {
        "weights of a block": BLOCK * max(_weights(model)),
        "statistics": 0,
        "hidden states": tape,
    }
    parts["factorisation"], parts["rounding"] = max(found, key=sum, default=(0, 0))
    return parts


def _rounded(model: Model, plan: Plan) -> list[list[tuple[int, int]]]:
    """Shapes of the layers of every group of which any is rounded; of like blocks' once."""
    found = []
    for index in range(model.blocks):
        for group in model.groups(index):
            if any(not plan.targets[name].kept for name in group.layers.values()):
                shapes = [model.shapes[name] for name in group.layers.values()]
                if shapes not in found:
                    found.append(shapes)
    return found


def _ahead(model: Model, plan: Plan, device: torch.device) -> int:
    """Most elements of the Hessians of a block's experts that are factored together."""
    most = 0
    for index in range(model.blocks):
        counts: Counter[tuple[tuple[str, ...], int]] = Counter()
        for group in model.groups(index):
            paths = list(group.layers.values())
            if any(not plan.targets[path].kept for path in paths):
                counts[tuple(group.layers), model.shapes[paths[0]][1]] += 1
        for (_, size), count in counts.items():
            room = min(count, ahead_count(size, device))
            most = max(most, size**2 * room * (room >= FEWEST))
    return most


def _tuned(model: Model, stage: Stage) -> int:
    """Most weights that a stage tunes at a time."""
    sizes = _weights(model)
    return sum(sizes) if stage.whole else stage.window[0] * max(sizes)


def _weights(model: Model) -> list[int]:
    """Of the layers of each block."""
    return [
        sum(math.prod(model.shapes[x]) for group in model.groups(i) for x in group.layers.values())
        for i in range(model.blocks)
    ]


def _walk(recipe: Recipe, tokens: int, own: int = 0) -> int:
    """Tokens that go through every block in one walk: for each stage's statistics, to advance, and
    in tuning.  own: windows that the model wrote, behind those of the tokens.
    """
    stages = sum(stage.reads for stage in recipe.stages)
    windows = tokens // recipe.data.length
    tuned = sum(stage.passes(windows + stage.whole * own) for stage in recipe.stages)
    return moving(recipe) * (stages + 1) * tokens + round(tuned * recipe.data.length)


def together(shapes: Sequence[tuple[int, int]], device: torch.device) -> int:
    """Weights of a group that are rounded at once: of all its layers where there is room."""
    sizes = [math.prod(shape) for shape in shapes]
    return sum(sizes) if ROW_BYTES * sum(sizes) <= stack_bytes(device) else max(sizes)


def _block(
    model: Model, recipe: Recipe, plan: Plan, index: int, device: torch.device
) -> dict[str, int]:
    needs = {need for stage in recipe.stages for need in stage.needs()}
    weights = sums = factor = sweep = 0
    for group in model.groups(index):
        shapes = [model.shapes[name] for name in group.layers.values()]
        columns = shapes[0][1]
        weights += sum(math.prod(shape) for shape in shapes)
        sums += sum(need.nbytes(columns) * (len(shapes) if need.own else 1) for need in needs)
        if any(not plan.targets[name].kept for name in group.layers.values()):
            sweep = max(sweep, SWEEP * together(shapes, device))
            factor = max(factor, FACTOR * columns**2 if needs else 0)
    found = {"weights of a block": BLOCK * weights, "statistics": sums}
    return {**found, "factorisation": factor, "rounding": sweep}


def _seconds(
    model: Model,
    recipe: Recipe,
    plan: Plan,
    nbytes: int,
    tokens: int,
    measuring: int,
    device: torch.device,
) -> float:
    rates, cores = GPU, 1
    if device.type == "cpu":
        rates, cores = CPU_CORE, torch.get_num_threads()
    weights = sum(math.prod(shape) for shape in model.shapes.values())
    stages = sum(stage.reads for stage in recipe.stages)
    passes = _walk(recipe, tokens, recipe.data.samples * recipe.data.written) * 2 * weights
    passes += 10 * measuring * weights  # forward, forward again with gradients, backward
    tries = len(candidates(recipe)) + 1 if measuring else 1
    if measuring and recipe.measure is not None and recipe.measure.tuned:
        passes += (tries - 1) * _walk(recipe, measuring) * 2 * weights
    sums = solves = columns_swept = 0
    for name, (out, columns) in model.shapes.items():
        if stages and not plan.targets[name].kept:
            # three or four layers share a Hessian: counting one in three
            sums += (tokens + measuring) * columns**2 // 3
            solves += stages * (columns**3 // 3 + tries * out * columns**2)
            columns_swept += stages * columns * (1 + bool(measuring))
    seconds = (passes + 2 * sums) / rates.forward + solves / rates.solve
    seconds += columns_swept * rates.column
    read = weights * model.dtype.itemsize * (3 if measuring else 1)
    return seconds / cores + (read + nbytes) / rates.stream
