"""What a run writes down about itself: lines of its log, and the identity a resume asks for."""

import hashlib
import json
import math
import platform
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

import aptq
from aptq.core.grid import Grid
from aptq.core.plan import Plan
from aptq.core.scores import Scores
from aptq.engine.block import Block
from aptq.model.model import Model
from aptq.planner import Choice
from aptq.recipe import Recipe
from aptq.store.checkpoint import predict
from aptq.store.manifest import to_json
from aptq.store.resume import Identity, source_files
from aptq.work import Work


def identity(
    work: Work, recipe: Recipe, plan: Plan | None, scores: Scores | None, *, whole: bool
) -> Identity:
    """What decides the bytes of a run; plan, scores: those that were given.

    whole: weights are known by their SHA-256, which takes as long as reading them.
    """
    table = tomllib.loads(recipe.text())
    table["stage"] = {str(number): stage for number, stage in enumerate(table["stage"])}
    given = {
        "plan": "" if plan is None else _digest(plan.to_json()),
        "scores": "" if scores is None else _digest(asdict(scores)),
    }
    return Identity(
        package=aptq.__version__,
        source=source_files(work.model.folder, whole=whole),
        data="" if work.batches is None else work.batches.sha256,
        recipe=table,
        given=given,
        dtype=str(work.model.dtype).removeprefix("torch."),
        recorded={
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "threads": str(torch.get_num_threads()),
            "device": device_name(work.device),
        },
    )


def device_name(device: torch.device) -> str:
    """cpu, or what the GPU is called."""
    return str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)


def _digest(value: Any) -> str:
    return hashlib.sha256(to_json(json.loads(json.dumps(value)))).hexdigest()


def start_line(work: Work, choice: Choice) -> dict[str, Any]:
    """The first line of the log: everything that identifies the run besides recipe and plan."""
    model = work.model
    whole = predict(model, Plan.uniform(model.shapes, Grid("bf16"), keep=["*"])).total
    found = {
        "source": model.source,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bits": choice.bits,
        "bytes_before": whole,
        "parameters": model.coverage.total,
        "bytes_predicted": choice.nbytes,
        "rule": choice.plan.made_by,
        "data": None if work.batches is None else work.batches.record(),
        "device": device_name(work.device),
        "threads": torch.get_num_threads(),
        "aptq": aptq.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    expected = choice.loss is not None
    return {**found, "expected_loss": [choice.loss, choice.noise]} if expected else found


def layer_lines(block: Block, model: Model) -> Iterator[dict[str, Any]]:
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
                "damping": None if layer is None else layer.damping,
                "counts": {} if layer is None else layer.counts,
            }
