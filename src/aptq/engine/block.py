"""Block: one transformer block in memory, its layers, and the statistics of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from aptq.core.parts import Dense
from aptq.core.plan import Plan
from aptq.engine.heap import trim_heap
from aptq.engine.layer import Layer
from aptq.engine.stat import Seen, Stat
from aptq.engine.stream import Stream, free_bytes
from aptq.model.layout import ResolvedGroup
from aptq.model.normalise import Experts

Order = Literal["block", "group"]


class Block:
    """What stages work on.  `groups` are in forward order; `layers` those the plan compresses."""

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        groups: Sequence[ResolvedGroup],
        plan: Plan,
        stream: Stream,
        order: Order,
    ) -> None:
        self.index, self.name, self.module = index, name, module
        self.groups, self.stream, self.order = list(groups), stream, order
        self.linears: dict[str, nn.Linear] = {}
        self.layers: dict[str, Layer] = {}
        self._fresh: dict[int, set[Stat]] = {}  # group number -> statistics that are still true
        for group in self.groups:
            for role, path in group.layers.items():
                linear = module.get_submodule(path.removeprefix(name + "."))
                assert isinstance(linear, nn.Linear), f"{path} is a {type(linear).__name__}"
                self.linears[path] = linear
                target = plan.targets[path]
                if target.kept:
                    continue
                bias = None if linear.bias is None else linear.bias.detach()
                layer = Layer(path, role, linear.weight.detach().float(), bias, target)
                if target.grid is not None and target.grid.dense:
                    # a 16-bit target asks nothing of any method
                    layer.parts.append(Dense(linear.weight.detach().to(torch.bfloat16)))
                self.layers[path] = layer

    def open_layers(self, group: ResolvedGroup) -> list[Layer]:
        """The group's layers that stages may work on: planned, and not 16-bit."""
        found = [self.layers[path] for path in group.layers.values() if path in self.layers]
        return [
            layer for layer in found if layer.target.grid is None or not layer.target.grid.dense
        ]

    def collect(self, needs: Sequence[Stat], group: ResolvedGroup) -> None:
        """Fill `layer.stats` of the group's layers, with as few forward passes as memory allows.

        order="block" observes all groups of the block in one pass, order="group" (true-sequential)
        only this one and its like (all experts), so that it sees its predecessors compressed.
        """
        wanted = self.groups
        if self.order == "group":
            wanted = self.groups[self.groups.index(group) : self._next(group)]
        todo = [g for g in wanted if set(needs) - self._fresh.get(self.groups.index(g), set())]
        todo = [g for g in todo if self.open_layers(g)]
        if not needs or not todo or group not in todo:
            return
        for some in self._slices(todo, needs):
            self._observe(some, needs)

    def _slices(
        self, groups: Sequence[ResolvedGroup], needs: Sequence[Stat]
    ) -> list[list[ResolvedGroup]]:
        """Cut `groups` so that one slice's sums take at most half of the free memory."""
        limit, used = free_bytes(self.stream.device) // 2, 0
        slices: list[list[ResolvedGroup]] = [[]]
        for group in groups:
            columns = self.linears[next(iter(group.layers.values()))].in_features
            size = sum(need.nbytes(columns) for need in needs)
            if slices[-1] and used + size > limit:
                slices.append([])
                used = 0
            slices[-1].append(group)
            used += size
        return slices

    def _observe(self, groups: Sequence[ResolvedGroup], needs: Sequence[Stat]) -> None:
        """One forward pass over all windows that shows `needs` the inputs of `groups`."""
        handles = []
        for group in groups:
            first = self.linears[next(iter(group.layers.values()))]
            stats = [need.start(first.in_features, self.stream.device) for need in needs]
            for layer in self.open_layers(group):
                layer.stats.update(zip(needs, stats, strict=True))
            self._fresh.setdefault(self.groups.index(group), set()).update(needs)
            handles.append(first.register_forward_pre_hook(self._watch(first, stats)))
        try:
            with torch.inference_mode():
                for _, call in self.stream.inputs(self.index):
                    call.run(self.module)
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, linear: nn.Linear, stats: Sequence[Stat]) -> Callable[..., None]:
        """A hook that shows the input of `linear` to `stats`, row by row."""
        owner = next(
            (
                module
                for module in self.module.modules()
                if isinstance(module, Experts) and any(linear is m for m in module.modules())
            ),
            None,
        )
        length = self.stream.length

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            tokens: Tensor | None
            if owner is not None:
                tokens = owner.routed
            else:
                # rows are tokens in order unless the model re-arranged them
                tokens = torch.arange(x.shape[0], device=x.device)
                tokens = tokens if x.shape[0] % length == 0 else None
            position = None if tokens is None else tokens % length
            for stat in stats:
                stat.update(Seen(x, position, length))

        return hook

    def commit(self, group: ResolvedGroup) -> None:
        """Put the sum of parts into the module, so that later passes see it."""
        for layer in self.open_layers(group):
            if layer.parts:
                linear = self.linears[layer.name]
                # a new tensor: the old one may be mapped onto the source file
                linear.weight.data = layer.dense().to(linear.weight.dtype)
            for stat in layer.stats.values():
                stat.forget()
        trim_heap()
        if self.order == "group":
            self._forget(self._next(group))

    def close_stage(self) -> None:
        """What was observed behind a changed group is stale from here on."""
        changed = [
            i
            for i, group in enumerate(self.groups)
            if any(x.parts for x in self.open_layers(group))
        ]
        if changed:
            self._forget(changed[0] + 1)

    def _next(self, group: ResolvedGroup) -> int:
        """Number of the first group behind `group` that may read what it changes.

        Neighbours of one kind and equal roles are experts, which do not read each other.
        """
        number = self.groups.index(group) + 1
        while number < len(self.groups):
            other = self.groups[number]
            if other.kind != group.kind or other.layers.keys() != group.layers.keys():
                break
            number += 1
        return number

    def _forget(self, start: int) -> None:
        """Drop the statistics of the groups from number `start` on."""
        for number in range(start, len(self.groups)):
            self._fresh.pop(number, None)
            for layer in self.open_layers(self.groups[number]):
                layer.stats.clear()

    def stored(self) -> dict[str, Tensor]:
        """Everything to write for this block by full name: parts, and what was kept as it is."""
        gone = {path + ".weight" for path in self.layers}
        named = {f"{self.name}.{key}": value for key, value in self.module.state_dict().items()}
        tensors = {key: value for key, value in named.items() if key not in gone}
        for path, layer in self.layers.items():
            for number, part in enumerate(layer.parts):
                for key, value in part.tensors().items():
                    tensors[f"{path}.parts.{number}.{key}"] = value
        return tensors
