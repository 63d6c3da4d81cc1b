"""Outer: compresses what a plan names outside the blocks, the embedding first and the head last.

The head is a linear layer: tr(E H E^T), H of its inputs in the compressed stream.  Each token is a
window of its own there, for an error in a logit reaches no later token.  An error dE_v of row v of
the embedding costs count(v) |dE_v|^2 (inputs are one-hot): no two columns meet in it, so H = I, and
the count, common to a row whose scales are its own, changes no choice.  A tied weight pays both:
about p(v) dE_v H dE_v^T, p(v) the mean probability of token v, and count(v) s |dE_v|^2.  A trained
model predicts tokens as often as they are counted, so all rows share H + s I.  Only gradients know
s; here both sides get the same trace, which is an assumption and not a measurement.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aptq.core.parts import PARTS, Dense, Part
from aptq.core.plan import Plan, Target
from aptq.engine.block import Block
from aptq.engine.heap import trim_heap
from aptq.engine.layer import Layer
from aptq.engine.stage import Stage
from aptq.engine.stat import Seen, Stat
from aptq.engine.stream import Stream, Where, open_stream
from aptq.engine.tail import replaced
from aptq.model.model import Model
from aptq.store.checkpoint import layer_parts

# Weights compressed at once (128 MiB of float32; a sweep holds about four times that): a
# vocabulary has 30 times the rows of a layer in a block, which must not decide the peak memory.
SLICE = 1 << 25


class Outer:
    """The outer layers of one run.  `parts`: of those that are finished, on the CPU; `records`:
    for the log, with `error` |W - Q|^2 / |W|^2 and `counts` the largest of all slices.

    Call `compress_embedding` before the stream is opened and `compress_head` with every finished
    block while it is loaded; each does nothing where the plan does not ask for it.  Stages see
    slices of rows, for all of them treat rows on their own.
    """

    def __init__(
        self, model: Model, plan: Plan, stages: Sequence[Stage], device: torch.device
    ) -> None:
        self.model, self.stages, self.device = model, list(stages), device
        planned = {name: plan.targets.get(name, Target()) for name in model.outer_shapes}
        self.targets = {name: target for name, target in planned.items() if not target.kept}
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.records: list[dict[str, object]] = []

    def compress_embedding(
        self, ids: Tensor | None, *, folder: Path, where: Where = "auto"
    ) -> None:
        """From here on the model's embedding is the compressed one; so is a tied head.

        ids [windows, length] int64, None if no stage needs data.  A tied head costs one walk of
        the float model over them, one block in memory, with the hidden states where `where` says.
        """
        name = self.model.arch.embed
        self.model.replace_outer({})  # of an earlier run
        if name not in self.targets:
            return
        stats, share = self._start(name), 1.0
        if stats and self.model.head_tied:
            assert ids is not None, "stages that need data and no windows"
            stream = open_stream(self.model, ids, device=self.device, folder=folder, where=where)
            for index in range(self.model.blocks):
                stream.advance(index, self.model.load(index, self.device))
                self.model.unload(index)
                trim_heap()
            share = self._show_head_inputs(stream, stats)
            stream.close()
        rows = torch.eye(self.model.outer_shapes[name][1], device=self.device) * share**0.5
        show(rows, stats)
        self._compress(name, "embed", stats)
        self.model.replace_outer({name: self.parts[name]})

    def restore(self, records: Sequence[dict[str, object]], tensors: Mapping[str, Tensor]) -> None:
        """Take back what `records` and `tensors()` were; the model's embedding with them."""
        self.records = list(records)
        for name in {entry.split(".parts.")[0] for entry in tensors}:
            how = self.targets[name], self.model.outer_shapes[name], tensors.__getitem__
            self.parts[name] = tuple(layer_parts(name, *how))
        embed = self.model.arch.embed
        self.model.replace_outer({n: p for n, p in self.parts.items() if n == embed})

    def compress_head(self, block: Block) -> None:
        """After the last block, still loaded: an untied head, on the stream behind that block."""
        name = self.model.arch.head
        if name not in self.targets or block.index + 1 < self.model.blocks:
            return
        stats = self._start(name)
        if stats:
            block.stream.advance(block.index, block.module)
            self._show_head_inputs(block.stream, stats)
        self._compress(name, "head", stats)

    def tensors(self) -> dict[str, Tensor]:
        """What Writer.finish stores of these layers, by full name."""
        return {
            f"{name}.parts.{number}.{key}": tensor
            for name, parts in self.parts.items()
            for number, part in enumerate(parts)
            for key, tensor in part.tensors().items()
        }

    def _start(self, name: str) -> dict[Stat, Stat]:
        """Empty sums of all that the stages need; none for a 16-bit target, which asks nothing."""
        columns = self.model.outer_shapes[name][1]
        dense = _is_dense(self.targets[name])
        return {} if dense else start(self.stages, columns, self.device)

    def _show_head_inputs(self, stream: Stream, stats: Mapping[Stat, Stat]) -> float:
        """Show what the head is given behind `stream`; the sum of squares of a mean column."""
        self.model.load_outer(self.device)
        total, columns = 0.0, 1
        for start in range(0, len(stream.hidden), stream.batch):
            x = head_inputs(self.model, stream.hidden[start : start + stream.batch])
            rows, columns = x.reshape(-1, x.shape[-1]), x.shape[-1]
            show(rows, stats)
            total += float(rows.float().square().sum(dtype=torch.float64))
        self.model.unload_outer()
        return total / columns

    def _compress(self, name: str, role: str, stats: Mapping[Stat, Stat]) -> None:
        """Run the stages on the layer, slice by slice, and keep what they made."""
        pieces: list[list[Part]] = []
        counts: dict[str, float] = {}
        sums = torch.zeros(2, dtype=torch.float64)
        slices = weight_slices(self.model, name)
        for rows in slices:
            layer = self._slice(name, role, rows.to(self.device), stats)
            squares = (layer.residual().square(), layer.weight.square())
            sums += torch.stack([x.sum(dtype=torch.float64) for x in squares]).cpu()
            counts |= {key: max(value, counts.get(key, 0)) for key, value in layer.counts.items()}
            pieces.append(layer.parts)
        self.parts[name] = tuple(_joined(some) for some in zip(*pieces, strict=True))
        sizes = {"weights": sum(rows.numel() for rows in slices)}
        sizes["before"] = sum(rows.nbytes for rows in slices)
        sizes["after"] = sum(part.nbytes for part in self.parts[name])
        found = {"name": name, "role": role, "grid": str(self.targets[name]), **sizes}
        error = float(sums[0] / sums[1].clamp(min=1e-300))
        self.records.append({**found, "error": error, "counts": counts})
        trim_heap()

    def _slice(self, name: str, role: str, rows: Tensor, stats: Mapping[Stat, Stat]) -> Layer:
        """Some rows [n, in] of the source's weight as a layer with its parts."""
        layer = Layer(name, role, rows.float(), None, self.targets[name], dict(stats))
        if _is_dense(layer.target):
            layer.parts.append(Dense(rows.to(torch.bfloat16)))
            return layer
        for stage in self.stages:
            layer = stage.on_layer(layer)
        if not layer.parts:
            raise ValueError(
                f"the recipe leaves a planned layer uncompressed\n{name}, target {layer.target}\n"
                "add a stage that quantizes, such as gptq or rtn"
            )
        return layer


def head_inputs(model: Model, hidden: Tensor) -> Tensor:
    """What the head is given when the last block puts out `hidden` [batch, length, width].

    All that lies between (norm, projections) is the model's own code and must be loaded
    (Model.load_outer); blocks only hand on, and the product with the head is left out.
    """
    head = model.skeleton.get_submodule(model.arch.head)
    hidden, found = hidden.to(next(head.parameters()).device), []

    def capture(x: Tensor) -> Tensor:
        found.append(x)
        return x[..., :1]

    blocks = model.skeleton.get_submodule(model.arch.blocks).children()
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    inside = replaced(blocks, lambda *_args, **_kwargs: hidden)
    with torch.inference_mode(), inside, replaced([head], capture):
        model.skeleton(input_ids=ids, use_cache=False)
    assert len(found) == 1, f"the head ran {len(found)} times"
    return found[0]


def show(x: Tensor, stats: Mapping[Stat, Stat]) -> None:
    """Show rows x [rows, in], each a window of its own, all of weight 1."""
    position = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    weight = torch.ones(len(x), device=x.device)
    for stat in stats.values():
        stat.update(Seen(x, position, 1, weight=weight))


def start(stages: Sequence[Stage], columns: int, device: torch.device) -> dict[Stat, Stat]:
    """Empty sums of all that the stages need for a layer of this width."""
    needs = dict.fromkeys(need for stage in stages for need in stage.needs())
    return {need: need.start(columns, device) for need in needs}


def weight_slices(model: Model, name: str) -> tuple[Tensor, ...]:
    """The weight of an outer layer on the CPU, in the rows [n, in] that stages see at once."""
    model.load_outer()
    weight: Tensor = model.skeleton.get_parameter(f"{name}.weight").detach()
    model.unload_outer()
    step = max(1, SLICE // weight.shape[1] // 8) * 8  # so that packed zeros begin at a byte
    return torch.split(weight, step)


def _is_dense(target: Target) -> bool:
    return target.grid is not None and target.grid.dense


def _joined(parts: Sequence[Part]) -> Part:
    """Parts of consecutive rows, a multiple of 8 in all but the last, as one part on the CPU."""
    named, meta = [part.tensors() for part in parts], parts[0].meta()
    tensors = {key: torch.cat([some[key].cpu() for some in named]) for key in named[0]}
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    return PARTS[meta["type"]].load(tensors, meta, shape)
