"""llama.cpp's file: weights, hyperparameters, tokenizer and chat template in one .gguf.

Codes and scales go over as they are where a block type of ggml is the same grid: int4-g32 is Q4_0,
int5-g32 Q5_0, int8-g32 Q8_0, and grids with ggml's names are its types (q4_k, iq4_nl).  Q4_1 and
Q5_1 hold d * code + m with an fp16 minimum m.  Ours is -zero * scale, 22 bits wide, so in general
no fp16: rounding it moves all weights of a group by at most |zero| * 2^-11 of a step, 0.0074 for
int4 and 0.0152 for int5.  Layouts: ggml's block types as in the package gguf 0.19.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.kbytes import packed
from aptq.core.kquants import SUPER, recovered
from aptq.core.parts import Quantized
from aptq.core.plan import Plan
from aptq.export import Exporter, Obstacle, Report, Stored, exporters, unlike
from aptq.model.ggufmeta import FAMILIES, add_model, add_tokenizer, rope_factors, unsupported
from aptq.model.model import Model
from aptq.model.weights import check_finite_tensor

BLOCK = 32  # columns that share a scale in all of these types
_EXACT = {"int4": Kind.Q4_0, "int5": Kind.Q5_0, "int8": Kind.Q8_0}
_MINIMUM = {"int4": Kind.Q4_1, "int5": Kind.Q5_1}
_KEPT = {torch.bfloat16: Kind.BF16, torch.float16: Kind.F16, torch.float32: Kind.F32}
_DTYPES = {kind: dtype for dtype, kind in _KEPT.items()}
_ROPE = "rope_freqs.weight"  # the one tensor that comes from the config


class Entry(NamedTuple):
    """A tensor of the file: its type and shape, and its name here."""

    kind: Kind
    shape: tuple[int, ...]
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size


@exporters.register("gguf")
@dataclass(frozen=True, kw_only=True)
class Gguf(Exporter):
    """One file for llama.cpp; every layer has a type of its own."""

    kept: Literal["same", "bf16", "f16"] = "same"  # what is not quantized: not rounded either
    nearest: bool = False  # integer zeros too, their minimum rounded to fp16; off: say so first

    def check(self, model: Model, plan: Plan) -> list[Obstacle]:
        """What llama.cpp lacks: the family, a feature of it, the tokenizer, the grid of a layer."""
        other = "choose a model of another family or export to compressed-tensors"
        found = [Obstacle("the model", why, other) for why in unsupported(model)]
        if found:
            return found
        try:
            add_tokenizer(gguf.GGUFWriter(None, "dry"), model)
        except ValueError as error:
            why = " ".join(str(error).split("\n"))
            found.append(Obstacle("the tokenizer", why, "give the model a tokenizer.json of BPE"))
        shapes = {**model.shapes, **model.outer_shapes}
        for name, target in plan.targets.items():
            grid = target.grid
            if not target.plain:
                found.append(Obstacle(name, unlike(target), "plan with one grid for each layer"))
            elif grid is not None:
                found += self._obstacles(name, grid, shapes[name])
        return found

    def nbytes(self, model: Model, plan: Plan) -> int:
        """Exact bytes of the file, from the outline of the model; reads no weights."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header"
            writer, entries = self._begin(model, plan, path)
            writer.close()
            sizes = [path.stat().st_size, *(entry.nbytes for entry in entries.values())]
        return sum(writer.ggml_pad(size, writer.data_alignment) for size in sizes)

    def write(self, stored: Stored, out: Path, report: Report) -> None:
        """Write the file tensor by tensor; no more than one is in memory."""
        model = stored.model
        writer, entries = self._begin(model, stored.checkpoint.plan, out)
        inside, done = f"{model.arch.blocks}.", 0
        sources = [e.source for e in entries.values() if e.source.startswith(inside)]
        last = {name.removeprefix(inside).partition(".")[0]: name for name in sources}.values()
        try:
            for entry in entries.values():
                writer.write_tensor_data(_data(stored, entry))
                if entry.source in last:
                    done += 1
                    report(done, model.blocks)
        finally:
            writer.close()

    def _begin(
        self, model: Model, plan: Plan, path: Path
    ) -> tuple[gguf.GGUFWriter, dict[str, Entry]]:
        """A writer whose header is at `path`, and the tensors that are to follow."""
        entries = self._entries(model, plan)
        weights: dict[Kind, int] = {}
        for entry in entries.values():
            weights[entry.kind] = weights.get(entry.kind, 0) + prod(entry.shape)
        arch = FAMILIES[model.config.model_type].arch
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
        add_model(writer, model, max(weights, key=lambda kind: weights[kind]))
        add_tokenizer(writer, model)
        for name, entry in entries.items():
            dtype = np.dtype(np.float32)  # only says that the shape counts weights, not bytes
            writer.add_tensor_info(name, entry.shape, dtype, entry.nbytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer, entries

    def _entries(self, model: Model, plan: Plan) -> dict[str, Entry]:
        """Tensors by their names in the file, in the order of the model; tied ones once."""
        names = gguf.get_tensor_name_map(FAMILIES[model.config.model_type].arch, model.blocks)
        found: dict[str, Entry] = {}
        for path, tensor in model.skeleton.state_dict().items():
            if path in model.tied:
                continue
            name = names.get_name(path, try_suffixes=(".weight", ".bias"))
            assert name is not None, f"gguf has no name for {path}"
            target = plan.targets.get(path.removesuffix(".weight"))
            if target is not None and target.grid is not None:
                kind = self._kind(target.grid)
                assert kind is not None, (path, str(target))
            elif tensor.dim() < 2:
                kind = Kind.F32  # norms and biases: llama.cpp computes with nothing else
            else:
                kind = _KEPT[model.dtype] if self.kept == "same" else Kind[self.kept.upper()]
            found[name] = Entry(kind, tuple(tensor.shape), path)
        factors = rope_factors(model)
        if factors is not None:
            found[_ROPE] = Entry(Kind.F32, factors.shape, _ROPE)
        return found

    def _kind(self, grid: Grid) -> Kind | None:
        """The block type that holds a grid."""
        if grid.special or grid.dense:
            return Kind[grid.element.upper()]
        if grid.group != BLOCK or grid.scale != "fp16":
            return None
        if grid.zero == "none":
            return _EXACT.get(grid.element)
        return _MINIMUM.get(grid.element) if grid.zero == "float" or self.nearest else None

    def _obstacles(self, name: str, grid: Grid, shape: tuple[int, int]) -> Iterator[Obstacle]:
        if self._kind(grid) is None:
            whole = grid.zero == "int" and grid.group == BLOCK and grid.element in _MINIMUM
            more = "; nearest = true would round its minimum" if whole and not self.nearest else ""
            exact = [f"{element}-g{BLOCK}" for element in _EXACT]
            rounded = [f"{element}-g{BLOCK}-fz" for element in _MINIMUM]
            grids = ", ".join([*exact, *rounded])
            why = f"no block type of ggml is {grid}{more}"
            yield Obstacle(name, why, f'plan with profile = "gguf" or candidates of {grids}')
        elif not grid.dense and shape[1] % (size := BLOCK if grid.kind is None else SUPER):
            why = f"{shape[1]} columns are no multiple of {size}"
            yield Obstacle(name, why, "keep this layer")


def _data(stored: Stored, entry: Entry) -> np.ndarray:
    """The bytes of a tensor, uint8 [rows, bytes of a row]."""
    model, path = stored.model, entry.source
    if path == _ROPE:
        factors = rope_factors(model)
        assert factors is not None
        return factors.view(np.uint8)
    order = _order(model, path, entry.shape[0])
    if entry.kind not in _DTYPES:
        part = stored.part([path.removesuffix(".weight")])
        return blocks(part, order, path)
    layer = path.removesuffix(".weight")
    planned = layer in stored.checkpoint.plan.targets
    tensor = stored.weight([layer]) if planned else stored.checkpoint.tensor(path)
    tensor = tensor[order].to(_DTYPES[entry.kind])
    if path.endswith("norm.weight"):
        tensor = tensor + model.arch.norm_shift  # float32, so exact for every 16-bit weight
    check_finite_tensor(path, tensor)
    raw: np.ndarray = tensor.contiguous().view(torch.uint8).numpy()
    return raw


def _order(model: Model, path: str, rows: int) -> Tensor:
    """LongTensor [rows]: which row of ours is row i of the file.

    Llama's rotary embedding turns neighbours (2i, 2i + 1) there and (i, i + half) here.
    """
    order, values = torch.arange(rows), model.config.to_dict()
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(path.split(".")[-2])
    if key is None or not FAMILIES[model.config.model_type].permuted:
        return order
    return order.view(values[key], 2, -1).transpose(1, 2).flatten()


def blocks(part: Quantized, order: Tensor, name: str) -> np.ndarray:
    """uint8 [out, groups * bytes of a block]: scale, minimum, fifth bits, codes of every block.

    order: LongTensor [out], the row of `part` for each row of the result.
    """
    rows, bits, scales = part.shape[0], part.grid.bits, part.scales()
    if part.grid.kind is not None:
        scale = scales.scale[order]
        low = torch.zeros_like(scale) if scales.zero is None else scales.zero[order] * scale
        steps = recovered(scale, low, part.grid.kind)
        raw: np.ndarray = packed(part.unpacked()[order], steps, part.grid.kind).numpy()
        return raw
    codes = part.unpacked()[order].view(rows, -1, BLOCK).numpy()
    fields = [scales.scale[order]]
    if scales.zero is not None:
        minimum = -(scales.zero[order].float() * scales.scale[order].float())
        fields.append(minimum.to(torch.float16))
    for each in fields:
        check_finite_tensor(name, each)
    heads = [each.contiguous().unsqueeze(-1).view(torch.uint8).numpy() for each in fields]
    if bits == 8:
        body = [codes ^ 0x80]  # code - 128 in two's complement
    else:
        low = codes & 15
        body = [low[..., :16] | low[..., 16:] << 4]
        if bits == 5:
            body.insert(0, np.packbits(codes >> 4, axis=-1, bitorder="little"))
    return np.concatenate([*heads, *body], axis=-1).reshape(rows, -1)
