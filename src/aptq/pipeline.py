"""The steps behind the commands: plan, compress, assess.

A run: check output folder and data, open the model, choose the plan, walk the blocks, publish.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aptq
from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.engine.block import Block
from aptq.engine.data import Batches, Data, check_source, limits_of, token_stream, tokens
from aptq.engine.stream import Stream, Where, open_stream
from aptq.engine.walk import Progress, walk
from aptq.evaluate.divergence import divergence
from aptq.evaluate.perplexity import perplexity
from aptq.failures import Unsound
from aptq.model.model import Model
from aptq.planner import Choice, uniform
from aptq.recipe import Recipe
from aptq.report import card, summary
from aptq.report.summary import Summary
from aptq.runfolder import RunFolder
from aptq.runtime.generate import sample
from aptq.runtime.open import find_device, open_any, original
from aptq.store.checkpoint import Checkpoint, Writer, predict

BUILTIN_WINDOWS = 8  # of builtin:pydoc, taken from its end, for calibration reads its beginning


@dataclass(frozen=True, slots=True)
class Step:
    """Progress: `done` of `total` units of `phase`."""

    phase: str
    done: int
    total: int


Report = Callable[[Step | str], None]  # progress, or a line that a person should see


def _silent(event: Step | str) -> None: ...


def choose(model: Model, recipe: Recipe, given: Plan | None = None) -> Choice:
    """The recipe's plan for `model`, or the `given` one, with its exact size.

    Raises Infeasible if no grid fits the budget, ValueError for a plan of other layers.
    """
    itemsize = model.dtype.itemsize

    def size(plan: Plan) -> int:
        return predict(model, plan).total

    if given is None:
        return uniform(
            model.shapes,
            recipe.grids,
            recipe.budget,
            keep=recipe.keep,
            itemsize=itemsize,
            size=size,
        )
    given.check(model.shapes)
    return Choice(given, None, given.bits(model.shapes, itemsize), size(given))


def plan(
    source: str | Path, recipe: Recipe | str = "best", *, revision: str | None = None
) -> Choice:
    """What `compress` would do to `source`: plan, bits per weight, bytes; reads no weights."""
    return choose(Model.open(source, revision=revision), _recipe(recipe))


def compress(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str = "best",
    plan: Plan | None = None,
    device: str = "auto",
    revision: str | None = None,
    strict: bool = False,
    activations: Where = "auto",
    report: Report = _silent,
) -> Summary:
    """Compress the model `source` into the new run folder `out`.

    `plan` replaces the recipe's choice of grids; `strict` raises Unsound where a layer needs a
    rescue; `activations` says where the hidden states lie ("auto": in memory while they are small
    beside what is free, else on the disk).  Raises ValueError for anything wrong with the inputs,
    before any weight is read.
    """
    began = time.perf_counter()
    chosen, on = _recipe(recipe), find_device(device)
    with RunFolder(Path(out), str(source)) as run:
        calibrated = any(stage.needs() for stage in chosen.stages)
        if calibrated:
            check_source(chosen.data)
        report(Step("open the model", 0, 1))
        model = Model.open(source, revision=revision)
        report(Step("open the model", 1, 1))
        choice = choose(model, chosen, plan)
        report(_decision(choice, chosen, plan))
        batches = _calibration(model, chosen.data, source, revision, on) if calibrated else None
        run.reserve(choice.nbytes + _states_bytes(model, batches))
        report(f"calibration: {batches or 'none of the stages needs data'}")
        chosen.dump(run.path / "recipe.toml")
        choice.plan.save(run.path / "plan.json")
        run.log("start", _start(model, choice, batches, on))
        states = _stream(model, batches, on, run.work, activations)
        _walk(run, model, chosen, choice.plan, states, strict, report)
        written = sum(file.stat().st_size for file in run.checkpoint.iterdir())
        assert written == choice.nbytes, f"predicted {choice.nbytes} bytes, wrote {written}"
        Checkpoint.open(run.checkpoint)  # as any reader will, before it gets its name
        seconds = round(time.perf_counter() - began, 3)
        run.log("done", {"seconds": seconds, "bytes_after": written})
        card.write(run.path)
        run.publish()
    return summary.read(Path(out))


def _walk(
    run: RunFolder,
    model: Model,
    recipe: Recipe,
    plan: Plan,
    states: Stream,
    strict: bool,
    report: Report,
) -> None:
    """Compress every block into the checkpoint of `run`."""
    writer = Writer(run.checkpoint, model, plan)

    def sink(block: Block) -> None:
        writer.write_block(block.index, block.stored())
        for values in _layers(block, model):
            run.log("layer", values)
            if strict and values["counts"].get("fallbacks"):
                raise _unsound(values)

    def progress(done: Progress) -> None:
        run.log("block", {"block": done.block, "seconds": round(done.seconds, 3)})
        report(Step("compress", done.block + 1, done.blocks))

    report(Step("compress", 0, model.blocks))
    walk(model, states, recipe.stages, plan, order=recipe.order, sink=sink, report=progress)
    states.close()
    writer.finish()


def _decision(choice: Choice, recipe: Recipe, given: Plan | None) -> str:
    """What was asked and what it became, in one line."""
    asked = f"budget {recipe.budget}: " if recipe.budget and given is None else ""
    grid = "as given" if choice.grid is None else str(choice.grid)
    return f"plan: {asked}{grid}, {choice.bits:.4f} bpw, {choice.nbytes:,} bytes"


def _states_bytes(model: Model, batches: Batches | None) -> int:
    """Size of the hidden states of all windows, which may have to lie on the disk."""
    width: int = model.config.get_text_config().hidden_size
    return 0 if batches is None else batches.ids.numel() * width * model.dtype.itemsize


def _recipe(recipe: Recipe | str) -> Recipe:
    return Recipe.load(recipe) if isinstance(recipe, str) else recipe


def _stream(
    model: Model, batches: Batches | None, device: torch.device, folder: Path, where: Where
) -> Stream:
    if batches is None:  # no stage looks at data: nothing flows through the blocks
        return Stream(torch.empty(0, 1, 1), [{} for _ in range(model.blocks)], 1, device)
    return open_stream(model, batches.ids, device=device, folder=folder, where=where)


def _calibration(
    model: Model, data: Data, source: str | Path, revision: str | None, device: torch.device
) -> Batches:
    """Calibration windows; for "self" the whole original is loaded to write them."""

    def sampler(samples: int, length: int, seed: int) -> Tensor:
        writer = original(source, device, revision=revision)
        return sample(writer.model, samples, length, seed, bos=writer.tokenizer.bos_token_id)

    return tokens(data, model.tokenizer, limits=limits_of(model.config), sampler=sampler)


def _start(
    model: Model, choice: Choice, batches: Batches | None, device: torch.device
) -> dict[str, Any]:
    """The first line of the log: everything that identifies the run besides recipe and plan."""
    whole = predict(model, Plan.uniform(model.shapes, Grid("bf16"), keep=["*"])).total
    return {
        "source": model.source,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": choice.bits,
        "bytes_before": whole,
        "bytes_predicted": choice.nbytes,
        "data": None if batches is None else batches.record(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "aptq": aptq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _layers(block: Block, model: Model) -> Iterator[dict[str, Any]]:
    """One line of the log for each linear of the block, compressed or kept."""
    for group in block.groups:
        for role, name in group.layers.items():
            layer = block.layers.get(name)
            weights = math.prod(model.shapes[name])
            before = weights * model.dtype.itemsize
            yield {
                "name": name,
                "role": role,
                "grid": "keep" if layer is None else str(layer.target),
                "weights": weights,
                "before": before,
                "after": before if layer is None else sum(part.nbytes for part in layer.parts),
                "error": 0.0 if layer is None else layer.error(),
                "counts": {} if layer is None else layer.counts,
            }


def _unsound(values: dict[str, Any]) -> Unsound:
    return Unsound(
        f"a layer needed a numerical rescue\n{values['name']}: {values['counts']}\n"
        "give more calibration data, raise damp in the recipe, or leave out --strict"
    )


def assess(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    data: Data | None = None,
    windows: int | None = None,
    window: int = 2048,
    device: str = "auto",
    revision: str | None = None,
    report: Report = _silent,
) -> dict[str, Any]:
    """Perplexity of `source`, and with a `reference` its perplexity and the divergence from it.

    Takes the first `windows` (all if None) windows of the text; of builtin:pydoc the last ones, for
    calibration reads its beginning.  Written to eval.json and the card if `source` is a run.
    """
    began, on = time.perf_counter(), find_device(device)
    text = data or Data()
    check_source(text)
    report(Step("load the model", 0, 1))
    model, tokenizer = open_any(source, on, revision=revision)
    report(Step("load the model", 1, 1))
    ids, _ = token_stream(text, tokenizer)
    if text.source == "builtin:pydoc":
        windows = windows or BUILTIN_WINDOWS
        ids = ids[-windows * window :]

    def progress(done: int, total: int) -> None:
        report(Step("evaluate", done, total))

    result: dict[str, Any] = {"model": str(source), "text": text.source, "window": window}
    if reference is None:
        found = perplexity(model, ids, window=window, limit=windows, device=on, progress=progress)
        result |= {"reference": None, "kl": None, "agreement": None}
    else:
        wanted, _ = open_any(reference, on, revision=revision)
        both = divergence(
            model, wanted, ids, window=window, limit=windows, device=on, progress=progress
        )
        found = both.model
        result["reference"] = {"model": str(reference), "perplexity": both.reference.ppl}
        result |= {"kl": both.kl, "agreement": both.agreement}
    result |= {"perplexity": found.ppl, "nll": found.nll}
    result |= {"windows": found.windows, "predictions": found.tokens}
    result["seconds"] = round(time.perf_counter() - began, 3)
    run = Path(source)
    if (run / "log.jsonl").is_file():
        (run / "eval.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        card.write(run)
    return result
