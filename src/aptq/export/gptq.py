"""GPTQ: whole numbers of 2, 3, 4 and 8 bits for gptqmodel, vLLM, SGLang and their relatives.

A weight is (u - z) * scale: our own codes, zeros and bit stream, turned by 90 degrees.  Files of
version 1 hold z - 1, those of version 2 hold z; a grid without zeros stores z = 2^(bits-1).
Scales are float16 of any sign: kernels only multiply by them.  bfloat16 scales are written where
float16 holds each of them exactly (magnitudes from 2^-17 to 65504), and refused elsewhere.
Readers: gptqmodel knows groups of 16, 32, ... 1024 columns and whole rows, and refuses zeros in
files of version 1 that it did not write; vLLM rounds scales to the dtype in which it runs, so that
float16 keeps them; transformers knows no `dynamic`: there all layers must have the same grid.
Source: gptqmodel 7.7.0 and the GPTQ loaders of vLLM.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import aptq
from aptq.core.grid import Grid
from aptq.core.parts import Quantized
from aptq.core.plan import Plan
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

BITS = (2, 3, 4, 8)  # that all readers have; 5, 6 and 7 have a layout which only gptqmodel reads
# Linears that vLLM loads as one, and the name by which it asks for their settings.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Scheme(NamedTuple):
    """What `dynamic` can set for a linear; fields are its keys."""

    bits: int
    group_size: int  # -1: the whole row
    sym: bool


@exporters.register("gptq")
@dataclass(frozen=True, kw_only=True)
class GPTQ(Exporter):
    """A Hugging Face folder whose plan may mix grids by `dynamic` rules."""

    # ours: 2 holds a zero of 0, and gptqmodel reads zeros in it; 1 is older and read more widely
    version: Literal[1, 2] = 2

    def check(self, model: Model, plan: Plan) -> list[Obstacle]:
        """As Exporter.check; values that a tensor cannot hold are found by `write`."""
        found = common_obstacles(model, plan)
        for path, layers in linears(model).items():
            grid = grid_of(plan, layers)
            if grid is not None and not grid.dense:
                found += _misfits(path, shape_of(model.shapes, layers), grid)
        return found

    def write(self, stored: Stored, out: Path, report: Report) -> None:
        """As Exporter.write; one block is in memory at a time.

        Raises ValueError, before it writes, for zeros of 0 in version 1 and for bfloat16 scales
        that float16 does not hold.
        """
        model, held, every = stored.model, stored.checkpoint, linears(stored.model)
        schemes = {path: _scheme(grid_of(held.plan, layers)) for path, layers in every.items()}
        named = {path: layers for path, layers in every.items() if schemes[path] is not None}
        for layer in (layer for layers in named.values() for layer in layers):
            part = held.layer(layer)[0]
            assert isinstance(part, Quantized), layer
            self._check_values(layer, part)
        config, texts = json.loads(model.config.to_json_string(use_diff=True)), {}
        if named:
            config["quantization_config"] = self._config(model, schemes)
            texts["quantize_config.json"] = json.dumps(config["quantization_config"], indent=2)
        shards = contents(
            held, model, named, lambda _, layers: packed(stored.part(layers), self.version)
        )
        count, files = model.blocks + 1, model.files()
        write_folder(out, shards, count, config=config, files=files, texts=texts, report=report)

    def _check_values(self, layer: str, part: Quantized) -> None:
        scale, zero = part.scales()
        if self.version == 1 and zero is not None and not zero.all():
            raise ValueError(
                f"GPTQ of version 1 has no zero of 0\n{layer}: {int((zero == 0).sum())} of "
                f"{zero.numel()} zeros are 0\nexport with --set version=2"
            )
        if not torch.equal(scale.half().float(), scale.float()):
            raise ValueError(
                f"GPTQ has float16 scales\n{layer}: some of the scales in {part.grid} have no "
                "equal in float16\ncompress with a grid without -bf16"
            )

    def _config(self, model: Model, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """quantization_config: the scheme of most weights, and rules for all other linears."""
        sizes: Counter[Scheme] = Counter()
        for path, layers in linears(model).items():
            if (scheme := schemes[path]) is not None:
                sizes[scheme] += math.prod(shape_of(model.shapes, layers))
        base = sizes.most_common(1)[0][0]
        form = "gptq" if self.version == 1 else "gptq_v2"
        return {
            "quant_method": "gptq",
            **base._asdict(),
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "checkpoint_format": form,
            "format": form,
            "dynamic": _rules(model, schemes, base),
            "meta": {"quantizer": [f"aptq:{aptq.__version__}"]},
        }


def packed(part: Quantized, version: Literal[1, 2]) -> dict[str, Tensor]:
    """Tensors of a linear by last name.

    qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales float16
    [groups, out], g_idx int32 [in]: the group of each column.
    """
    (scale, zero), grid = part.scales(), part.grid
    if zero is None:
        zero = torch.full(scale.shape, grid.levels // 2, dtype=torch.uint8)
    stored = zero - 1 if version == 1 else zero
    return {
        "qweight": pack_words(part.unpacked(), grid.bits).T.contiguous(),
        "qzeros": pack_words(stored.T.contiguous(), grid.bits),
        "scales": scale.T.half().contiguous(),
        "g_idx": grid.group_of(part.shape[1]).int(),
    }


def _scheme(grid: Grid | None) -> Scheme | None:
    if grid is None or grid.dense:
        return None
    return Scheme(grid.bits, grid.group or -1, grid.zero == "none")


def _misfits(path: str, shape: tuple[int, int], grid: Grid) -> list[Obstacle]:
    """Why the format cannot hold a linear of (out, in) on this grid."""
    if grid.element not in {f"int{bits}" for bits in BITS}:
        why = f"{grid}: readers share 2, 3, 4 and 8 bits only"
        return [Obstacle(path, why, "choose int2, int3, int4 or int8 grids")]
    found = columns_obstacle(path, shape, grid.group or 1)
    if grid.zero == "float":
        found.append(Obstacle(path, f"{grid} has fractional zeros", "choose whole zeros (-z)"))
    whole = 32 // math.gcd(32, grid.bits)
    if any(size % whole for size in shape):
        why = f"[{shape[0]}, {shape[1]}] are no multiples of {whole}, as {grid.bits} bits need them"
        found.append(Obstacle(path, why, "keep this layer or give it 8 bits"))
    return found


def _rules(
    model: Model, schemes: Mapping[str, Scheme | None], base: Scheme
) -> dict[str, dict[str, Any]]:
    """`dynamic`: regular expression of a linear's whole name -> scheme, for all not of `base`.

    "-:" leaves a matrix as it is.  A name under which vLLM loads several linears at once has a
    rule of its own where these are alike.
    """
    modules = dict(model.skeleton.named_modules())
    every = {
        name: schemes.get(name)
        for name, module in modules.items()
        if not isinstance(module, nn.Embedding) and name != model.arch.head
        if (weight := dict(module.named_parameters(recurse=False)).get("weight")) is not None
        and weight.dim() == 2
    }
    for parent in {name.rpartition(".")[0]: None for name in every}:
        for fused, roles in FUSED.items():
            parts = [f"{parent}.{role}" for role in roles]
            if every.keys() >= set(parts) and len({every[part] for part in parts}) == 1:
                every[f"{parent}.{fused}"] = every[parts[0]]
    stacked = {layer.partition(".experts.")[0] for layer in model.shapes if ".experts." in layer}
    rules: dict[str, dict[str, Any]] = {rf"-:^{re.escape(name)}\.experts\b": {} for name in stacked}
    for name, scheme in every.items():
        if scheme is None:
            rules[f"-:^{re.escape(name)}$"] = {}
        elif scheme != base:
            rules[f"+:^{re.escape(name)}$"] = scheme._asdict()
    return rules
