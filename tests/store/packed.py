"""A checkpoint of a tiny model, its weights rounded to nearest: what store and runtime test on."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.plan import Plan, Target
from aptq.model.model import Model
from aptq.store.checkpoint import Writer
from tests.kernels.samples import make


class Packed(NamedTuple):
    """The checkpoint folder, the model that it was made of, and the plan."""

    folder: Path
    model: Model
    plan: Plan


def mixed(model: Model) -> Plan:
    """Every kind of target in turn: odd bits, all kinds of zero, 16 bits, kept, a sum of two."""
    texts = [
        "int4-g16-z",
        "int3-g20",
        "bf16",
        "keep",
        "int8-row",
        "int2-g8-fz+int4-row-z",
        "int5-g7",
    ]
    return Plan({name: Target.parse(texts[i % len(texts)]) for i, name in enumerate(model.shapes)})


def block_tensors(model: Model, index: int, plan: Plan) -> dict[str, Tensor]:
    """What the writer wants for block `index`; a second part takes what the first one left."""
    block, prefix = model.load(index), model.block_name(index)
    tensors = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
    for layer, target in plan.targets.items():
        if target.kept or not layer.startswith(f"{prefix}."):
            continue
        rest = tensors.pop(f"{layer}.weight").float()
        for number, spec in enumerate(target.parts):
            part = make(str(spec.grid), rest)
            rest = rest - part.dense()
            for name, tensor in part.tensors().items():
                tensors[f"{layer}.parts.{number}.{name}"] = tensor
    model.unload(index)
    return tensors


def pack(source: Path, folder: Path, plan: Plan | str = "int4-g16-z") -> Packed:
    """Write the checkpoint of the model in `source` to `folder`; a text is a uniform grid."""
    model = Model.open(source)
    if isinstance(plan, str):
        plan = Plan.uniform(model.shapes, Grid.parse(plan)) if plan != "mixed" else mixed(model)
    writer = Writer(folder, model, plan)
    for index in range(model.blocks):
        writer.write_block(index, block_tensors(model, index, plan))
    writer.finish()
    return Packed(folder, model, plan)
