"""compressed-tensors, "pack-quantized": whole numbers of 2 to 8 bits for vLLM and transformers.

A weight is (q - z) * scale with signed q and z; stored are u = q + 2^(bits-1) and the zero in the
same way: our own codes and zeros, in the same bit stream.  Scales keep their sign and their value,
but vLLM rounds them to the dtype in which it loads the model.  transformers (5.23) decodes weights
of one kind while it loads: they are rounded to the dtype of the scales, then to the model's.
Several kinds it decodes at the first call, with rounded scales, and fails over packed zeros.
Source: package compressed-tensors 0.20.0, whose schema writes the config.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import Plan
from aptq.core.units import TILES, coupled
from aptq.core.words import pack_words
from aptq.export import (
    Exporter,
    Obstacle,
    Report,
    Stored,
    columns_obstacle,
    common_obstacles,
    exporters,
    grid_of,
    linears,
    shape_of,
)
from aptq.model.model import Model
from aptq.store.folder import contents, write_folder

# Of vLLM's Marlin kernels: 0 is one scale a row, a tile [out, in].  Source: its marlin_utils.py.
BITS, GROUPS, TILE = (4, 8), (0, 32, 64, 128), TILES["vllm"]


@exporters.register("compressed_tensors")
@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Exporter):
    """A Hugging Face folder with one config group for each kind of grid."""

    # ours: the wider of the two; "vllm" refuses what its 4- and 8-bit kernels cannot run
    target: Literal["transformers", "vllm"] = "transformers"

    def check(self, model: Model, plan: Plan) -> list[Obstacle]:
        """As Exporter.check.  Raises ValueError where the package is not installed."""
        if find_spec("compressed_tensors") is None:
            lines = "this format needs compressed-tensors", "the package is not installed"
            raise ValueError("\n".join([*lines, "pip install 'aptq[compressed-tensors]'"]))
        found, named, grids = common_obstacles(model, plan), linears(model), _grids(model, plan)
        if self.target == "transformers" and grids:
            why = "transformers reads experts in this format only as codes, this only as 16 bits"
            found += [Obstacle(name, why, "--set target=vllm") for name in sorted(_stacked(model))]
        zeros = self.target == "vllm" or len(_kinds(grids)) == 1
        for path, grid in grids.items():
            shape = shape_of(model.shapes, named[path])
            found += columns_obstacle(path, shape, grid.group or 1)
            if grid.zero == "float" or not grid.element.startswith("int"):
                why = f"{grid}: the format holds int2 to int8 with whole zeros (-z) or none"
                found.append(Obstacle(path, why, "choose such a grid"))
            elif grid.zero == "int" and not zeros:
                why = "transformers reads zeros only where all layers are of one kind"
                instead = "choose grids without zeros or one for all layers, or --set target=vllm"
                found.append(Obstacle(path, why, instead))
            if self.target == "vllm":
                found += _kernel_obstacles(path, shape, grid)
        return found + (_fused_obstacles(model, plan) if self.target == "vllm" else [])

    def write(self, stored: Stored, out: Path, report: Report) -> None:
        """As Exporter.write; one block is in memory at a time."""
        model, held, named = stored.model, stored.checkpoint, linears(stored.model)
        grids = _grids(model, held.plan)
        config = json.loads((held.folder / "config.json").read_text("utf-8"))
        del config["quantization_config"]
        if grids:
            config["quantization_config"] = _config(model, grids)
        codes = {path: named[path] for path in grids}
        made = contents(held, model, codes, lambda _, at: packed(stored.part(at), model.dtype))
        count, files = model.blocks + 1, model.files()
        write_folder(out, made, count, config=config, files=files, texts={}, report=report)


def _grids(model: Model, plan: Plan) -> dict[str, Grid]:
    """Linears of transformers that become codes."""
    grids = {path: grid_of(plan, layers) for path, layers in linears(model).items()}
    return {path: grid for path, grid in grids.items() if grid and not grid.dense}


def _kinds(grids: dict[str, Grid]) -> dict[tuple[int, int, bool], list[str]]:
    """(bits, group, symmetric) -> linears; their scales may differ in dtype."""
    found: dict[tuple[int, int, bool], list[str]] = {}
    for path, grid in grids.items():
        found.setdefault((grid.bits, grid.group, grid.zero == "none"), []).append(path)
    return found


def _stacked(model: Model) -> set[str]:
    """Layers that are no linears of transformers: experts, transposed weights."""
    return model.shapes.keys() - {layer for layers in linears(model).values() for layer in layers}


def _config(model: Model, grids: dict[str, Grid]) -> dict[str, Any]:
    """quantization_config of config.json; `ignore` names all other matrices, for vLLM."""
    import compressed_tensors
    from compressed_tensors import quantization as schema

    form = "pack-quantized"
    groups: dict[str, schema.QuantizationScheme] = {}
    for (bits, size, symmetric), paths in _kinds(grids).items():
        how = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        args = schema.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **how)
        scheme = schema.QuantizationScheme(targets=paths, weights=args, format=form)
        groups[f"group_{len(groups)}"] = scheme
    rest = _stacked(model)
    for path, module in model.skeleton.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            rest.add(path)
    ignore = sorted(rest - grids.keys())
    config = schema.QuantizationConfig(
        config_groups=groups, format=form, quantization_status="compressed", ignore=ignore
    ).model_dump(mode="json")
    at_once = {"dequantize": True} if len(groups) == 1 else {}
    return {"version": compressed_tensors.__version__, **config, **at_once}


def packed(part: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a linear in a model of `dtype`, by last name: weight_packed int32 [out, words].

    weight_scale [out, groups], weight_zero_point int32 [words of out, groups], weight_shape [2].
    """
    (scale, zero), bits = part.scales(), part.grid.bits
    if dtype != torch.bfloat16:  # nor shall decoding round to a dtype less exact than the model's
        scale = scale.to(torch.promote_types(scale.dtype, dtype))
    tensors = {"weight_packed": pack_words(part.unpacked(), bits), "weight_scale": scale}
    if zero is not None:
        tensors["weight_zero_point"] = pack_words(zero.T.contiguous(), bits).T
    return tensors | {"weight_shape": torch.tensor(part.shape)}


def _kernel_obstacles(path: str, shape: tuple[int, int], grid: Grid) -> list[Obstacle]:
    """What vLLM's kernels do not run."""
    found = []
    zeros = grid.bits == 8 and grid.zero != "none"
    if grid.bits not in BITS or zeros or grid.group not in GROUPS:
        why = f"{grid}: vLLM runs int4, and int8 without zeros, in groups of 32, 64, 128 or a row"
        found.append(Obstacle(path, why, "choose such a grid"))
    if shape[0] % TILE[0] or shape[1] % TILE[1]:
        why = f"{list(shape)} is no multiple of {list(TILE)}, which vLLM needs"
        found.append(Obstacle(path, why, "keep this layer"))
    return found


def _fused_obstacles(model: Model, plan: Plan) -> list[Obstacle]:
    """Linears that vLLM loads as one, of different grids."""
    groups = [group.layers for index in range(model.blocks) for group in model.groups(index)]
    found = []
    for layers in coupled("vllm", groups):
        kinds = sorted({str(plan.targets[layer]) for layer in layers})
        if len(kinds) > 1:
            why = f"vLLM loads it and its neighbours as one matrix, of {', '.join(kinds)}"
            found.append(Obstacle(layers[0], why, "compress with --profile vllm"))
    return found
