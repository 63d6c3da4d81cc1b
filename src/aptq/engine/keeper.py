"""Keeper: puts what a walk needs to go on into the run's journal after every block, and back.

Finished blocks are there as they are stored.  Hidden states are stored too, or computed again from
these blocks: what a block's parts add up to is what the walk has run with, bit for bit.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from aptq.core.plan import Plan, Target
from aptq.engine.block import Block
from aptq.engine.compressed import moved
from aptq.engine.heap import trim_heap
from aptq.engine.stream import Stream
from aptq.engine.walk import Line
from aptq.model.model import Model
from aptq.store.checkpoint import layer_parts
from aptq.store.objects import Journal

EXACT = ".exact"  # name of a layer's float32 weight, where a stage has changed it


class Keeper:
    """One walk of `model` under `plan`, kept in `state`.

    store: hidden states are stored; else they are computed again.  Whoever finishes a block puts
    `Block.stored()` into the journal as "block-N".
    """

    def __init__(
        self, state: Journal, model: Model, plan: Plan, device: torch.device, *, store: bool
    ) -> None:
        self.state, self.model, self.plan = state, model, plan
        self.device, self.store = device, store
        self.line: Line | None = None

    @property
    def first(self) -> int:
        """Number of the first block that is not finished."""
        return int(self.state.values.get("first", 0))

    def resume(self, line: Line, make: Callable[[int], Block]) -> int:
        """Bring streams and held blocks to where they were; number of the next block to load."""
        self.line = line
        streams = _streams(line)
        if self.first and streams.keys() <= self.state.files.keys():
            for name, stream in streams.items():
                _fill(stream, self.state, name)
        elif len(line.stream.hidden):
            for index in range(self.first):
                self._advance(line, index)
        held = self.state.values.get("held", {})
        line.held = [self._reopened(make(int(index)), known) for index, known in held.items()]
        return self.first + len(line.held)

    def save(self, block: int) -> None:
        """The work on block number `block` is done: what was finished is kept from here on."""
        assert self.line is not None, "a walk begins with resume"
        held, values = self.line.held, self.state.values
        values["first"] = held[0].index if held else block + 1
        values["held"] = {str(one.index): told(one) for one in held}
        self.state.drop(lambda name: not name.startswith("held-"))
        for one in held:
            self.state.put_tensors(f"held-{one.index}", self._open_state(one))
        if self.store and self.first < self.model.blocks:
            for name, stream in _streams(self.line).items():
                self.state.put_tensors(name, {name: stream.hidden})
        self.state.publish()

    def finished(self, index: int, stream: Stream) -> Block:
        """A finished block, loaded; to be closed by `Model.unload`."""
        model = self.model
        module, name = model.load(index, self.device), model.block_name(index)
        block = Block(index, name, module, model.groups(index), self.plan, stream, "block")
        tensors = self.state.tensors(f"block-{index}")
        for path, layer in block.layers.items():
            layer.parts = self._parts(path, tensors, layer.target)
            if layer.target.grid is None or not layer.target.grid.dense:  # no stage has replaced it
                linear = block.linears[path]
                linear.weight.data = layer.dense().to(linear.weight.dtype)
        self._put(block, {n[len(name) + 1 :]: x for n, x in tensors.items() if ".parts." not in n})
        return block

    def _advance(self, line: Line, index: int) -> None:
        """Move the streams through block `index`."""
        if line.original is not None:
            line.original.advance(index, self.model.load(index, self.device))
            self.model.unload(index)
        line.stream.advance(index, self.finished(index, line.stream).module)
        self.model.unload(index)
        trim_heap()

    def _open_state(self, block: Block) -> dict[str, Tensor]:
        """All tensors of a block that stages will get again."""
        found = {f"module.{key}": value for key, value in block.module.state_dict().items()}
        for path, layer in block.layers.items():
            for number, part in enumerate(layer.parts):
                for key, value in part.tensors().items():
                    found[f"{path}.parts.{number}.{key}"] = value
            if block.origin is None or not torch.equal(
                block.origin.module.get_parameter(f"{path[len(block.name) + 1 :]}.weight").float(),
                layer.weight,
            ):
                found[f"{path}{EXACT}"] = layer.weight
        return found

    def _reopened(self, block: Block, known: Mapping[str, Any]) -> Block:
        """A fresh block as `_open_state` and `told` have it."""
        tensors = self.state.tensors(f"held-{block.index}")
        inside = {n.removeprefix("module."): x for n, x in tensors.items() if n[:7] == "module."}
        self._put(block, inside)
        for path, layer in block.layers.items():
            if f"{path}{EXACT}" in tensors:
                layer.weight = tensors[f"{path}{EXACT}"].to(self.device)
            bias = block.linears[path].bias
            layer.bias = None if bias is None else bias.detach()
            layer.parts = self._parts(path, tensors, layer.target)
        tell(block, known)
        return block

    def _parts(self, path: str, tensors: Mapping[str, Tensor], target: Target) -> list[Any]:
        """The parts of a layer that there are, on the device."""
        prefix, shape = f"{path}.parts.", {**self.model.shapes, **self.model.outer_shapes}[path]
        there = {n[len(prefix) :].split(".")[0] for n in tensors if n.startswith(prefix)}
        some = Target(target.parts[: len(there)])
        return [moved(p, self.device) for p in layer_parts(path, some, shape, tensors.__getitem__)]

    def _put(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """New values of tensors of the module, by their names there."""
        state = block.module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            state[name].data = tensor.to(self.device)


def told(block: Block) -> dict[str, Any]:
    """What stages and walk have reported of a block, as JSON."""
    return {
        "layers": {name: [x.counts, x.damping] for name, x in block.layers.items()},
        "records": block.records,
        "notes": block.notes,
    }


def tell(block: Block, known: Mapping[str, Any]) -> None:
    """The inverse of `told`."""
    for name, layer in block.layers.items():
        layer.counts, layer.damping = known["layers"][name]
    block.records, block.notes = known["records"], known["notes"]


def _streams(line: Line) -> dict[str, Stream]:
    """The streams that enter the first unfinished block, by their names in the journal."""
    return {"hidden": line.stream} | ({} if line.original is None else {"original": line.original})


def _fill(stream: Stream, state: Journal, name: str) -> None:
    """Hidden states as they were stored."""
    path = state.path(name)
    assert path is not None, name
    with safe_open(path, framework="pt", device="cpu") as file:
        rows = file.get_slice(name)
        for start in range(0, len(stream.hidden), stream.batch):
            stream.hidden[start : start + stream.batch] = rows[start : start + stream.batch].to(
                stream.hidden.device
            )
