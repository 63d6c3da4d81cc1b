"""One run: compress a model by a plan into a run folder, with everything a reader of it needs."""

import math
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

import aptq
from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.core.scores import Scores
from aptq.engine.block import Block
from aptq.engine.compressed import Compressed
from aptq.engine.outer import Outer
from aptq.engine.stream import Stream, open_stream
from aptq.engine.walk import Progress, walk
from aptq.failures import Unsound
from aptq.model.model import Model
from aptq.planner import Choice
from aptq.recipe import Recipe
from aptq.runfolder import RunFolder
from aptq.store.checkpoint import Checkpoint, Writer, predict
from aptq.work import Step, Work


def make(run: RunFolder, work: Work, recipe: Recipe, choice: Choice, scores: Scores | None) -> int:
    """Compress into the checkpoint of `run`, log everything; bytes written.

    Raises Unsound where a layer needs a rescue and `work.strict` forbids it.
    """
    recipe.dump(run.path / "recipe.toml")
    choice.plan.save(run.path / "plan.json")
    if scores is not None:
        scores.save(run.path / "scores.json")
    run.log("start", _start(work, choice))
    outer = Outer(work.model, choice.plan, recipe.stages, work.device)
    ids = None if work.batches is None else work.batches.text
    outer.compress_embedding(ids, folder=run.work, where=work.activations)
    writer = Writer(run.checkpoint, work.model, choice.plan)
    _walk(run, work, recipe, choice.plan, writer, outer)
    for values in outer.records:
        _log(run, values, work.strict)
    writer.finish(outer.tensors())
    written = sum(file.stat().st_size for file in run.checkpoint.iterdir())
    assert written == choice.nbytes, f"predicted {choice.nbytes} bytes, wrote {written}"
    Checkpoint.open(run.checkpoint)  # as any reader will, before it gets its name
    return written


def _walk(
    run: RunFolder, work: Work, recipe: Recipe, plan: Plan, writer: Writer, outer: Outer
) -> None:
    """Compress every block and an untied head; stages for the whole model come after the walk."""
    model, order = work.model, recipe.order
    phase = f"compress {recipe.budget}".strip()
    compressed = _after(run, work, recipe, plan)

    def sink(block: Block) -> None:
        writer.write_block(block.index, block.stored())
        for values in _layers(block, model):
            _log(run, values, work.strict)
        for record in block.records:
            run.log("tuned", {"block": block.index, **record})

    def walked(block: Block) -> None:
        outer.compress_head(block)
        (sink if compressed is None else compressed.keep)(block)

    def progress(done: Progress) -> None:
        run.log("block", {"block": done.block, "seconds": round(done.seconds, 3)})
        work.show(phase, done)

    work.report(Step(phase, 0, model.blocks))
    if work.batches is None:  # no stage looks at data: nothing flows through the blocks
        empty: list[dict[int, Any]] = [{} for _ in range(model.blocks)]
        states = Stream(torch.empty(0, 1, 1), empty, 1, work.device)
    else:
        where, ids = work.activations, work.batches.text
        states = open_stream(model, ids, device=work.device, folder=run.work, where=where)
    stages, profiles = recipe.stages, work.profiles
    walk(model, states, stages, plan, order=order, sink=walked, report=progress, profiles=profiles)
    states.close()
    if compressed is not None:
        for stage in recipe.stages:
            stage.on_model(compressed)
        for index in range(model.blocks):
            sink(compressed.open(index, states))
            model.unload(index)


def _after(run: RunFolder, work: Work, recipe: Recipe, plan: Plan) -> Compressed | None:
    """Where finished blocks wait for the stages that work on the whole model, if there are any."""
    if not any(stage.whole for stage in recipe.stages):
        return None
    assert work.batches is not None, "a stage for the whole model reads data"

    def report(phase: str, done: int, total: int) -> None:
        work.report(Step(f"{phase} {recipe.budget}".strip(), done, total))

    data, how = work.batches, (work.device, run.work, work.activations, work.profiles, report)
    return Compressed(work.model, plan, data.ids, data.written, *how)


def _start(work: Work, choice: Choice) -> dict[str, Any]:
    """The first line of the log: everything that identifies the run besides recipe and plan."""
    model, device = work.model, work.device
    whole = predict(model, Plan.uniform(model.shapes, Grid("bf16"), keep=["*"])).total
    found = {
        "source": model.source,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": choice.bits,
        "bytes_before": whole,
        "bytes_predicted": choice.nbytes,
        "rule": choice.plan.made_by,
        "data": None if work.batches is None else work.batches.record(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "aptq": aptq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    expected = choice.loss is not None
    return {**found, "expected_loss": [choice.loss, choice.noise]} if expected else found


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


def _log(run: RunFolder, values: dict[str, Any], strict: bool) -> None:
    run.log("layer", values)
    if strict and values["counts"].get("fallbacks"):
        raise Unsound(
            f"a layer needed a numerical rescue\n{values['name']}: {values['counts']}\n"
            "give more calibration data, raise damp in the recipe, or leave out --strict"
        )
