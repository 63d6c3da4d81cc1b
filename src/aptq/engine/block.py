"""Block: one transformer block in memory, its layers, and the statistics of their inputs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aptq.core.parts import Dense
from aptq.core.plan import Plan
from aptq.core.profile import Profiles
from aptq.engine.halt import Halt
from aptq.engine.heap import trim_heap
from aptq.engine.layer import Layer
from aptq.engine.origin import Origin
from aptq.engine.shown import Shown
from aptq.engine.siblings import lend
from aptq.engine.stat import Seen, Stat
from aptq.engine.stream import Stream, sliced
from aptq.engine.weighting import Weighting
from aptq.model.layout import ResolvedGroup
from aptq.model.normalise import Experts
from aptq.model.watch import AttentionTrace, Lookup, watched

Order = Literal["block", "group"]


def _untraced(_path: str) -> AttentionTrace | None:
    raise AssertionError("nothing is watched")


TRIMMED = 64 << 20  # bytes of a group's weights from which its memory is given back at once


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
        profiles: Profiles | None = None,
        origin: Origin | None = None,
    ) -> None:
        """`profiles` weight rows, `origin` shows the inputs of the uncompressed model."""
        self.index, self.name, self.module = index, name, module
        self.groups, self.stream, self.order = list(groups), stream, order
        self.linears: dict[str, nn.Linear] = {}
        self.layers: dict[str, Layer] = {}
        self._fresh: dict[int, set[Stat]] = {}  # group number -> statistics that are still true
        self._window = 0  # number of the first window of the batch that is on its way
        self._trace: Lookup = _untraced  # of a linear while its batch is on its way
        self.origin, self._before = origin, dict[str, Tensor]()  # its inputs of that batch
        self.records: list[dict[str, Any]] = []  # what stages report of the whole block
        self.notes: list[dict[str, Any]] = []  # what the walk has seen of it, for the report
        known = profiles or Profiles(0, {})
        self.weighting = Weighting(known, self.layers, stream)
        for group in self.groups:
            for role, path in group.layers.items():
                linear = module.get_submodule(path.removeprefix(name + "."))
                assert isinstance(linear, nn.Linear), f"{path} is a {type(linear).__name__}"
                self.linears[path] = linear
                layer = self._open(path, role, linear, plan)
                if layer is None:
                    continue
                layer.window = known.window
                layer.profile = known.of.get(path)
                layer.marked = known.marks.get(path)
                self.layers[path] = layer

    def _open(self, path: str, role: str, linear: nn.Linear, plan: Plan) -> Layer | None:
        """The layer that stages will work on, or None where the plan keeps the linear."""
        target = plan.targets[path]
        if target.kept:
            return None
        bias = None if linear.bias is None else linear.bias.detach()
        layer = Layer(path, role, linear.weight.detach().float(), bias, target)
        if target.grid is not None and target.grid.dense:
            # a 16-bit target asks nothing of any method
            layer.parts.append(Dense(linear.weight.detach().to(torch.bfloat16)))
        return layer

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
        wanted = self.alike(group) if self.order == "group" else self.groups
        todo = [g for g in wanted if set(needs) - self._fresh.get(self.groups.index(g), set())]
        todo = [g for g in todo if self.open_layers(g)]
        if not needs or not todo or group not in todo:
            return
        for some in self._slices(todo, needs):
            self._observe(some, needs)

    def _slices(
        self, groups: Sequence[ResolvedGroup], needs: Sequence[Stat]
    ) -> list[list[ResolvedGroup]]:
        """Cut `groups` so that the sums of one slice fit in memory."""

        def sums(group: ResolvedGroup) -> int:
            columns = self.linears[next(iter(group.layers.values()))].in_features
            layers = len(self.open_layers(group))
            return sum(need.nbytes(columns) * (layers if need.own else 1) for need in needs)

        return sliced(groups, sums, self.stream.device)

    def _observe(self, groups: Sequence[ResolvedGroup], needs: Sequence[Stat]) -> None:
        """One forward pass over all windows that shows `needs` the inputs of `groups`."""
        assert not any(need.gradient for need in needs), f"no gradients in a forward walk: {needs}"
        idle = any(isinstance(module, Experts) for module in self.module.modules())
        halt = Halt(alike=not idle and not any(need.watches for need in needs))
        with ExitStack() as stack:
            stack.enter_context(self._watching(needs))
            for group in groups:
                first = self.linears[next(iter(group.layers.values()))]
                layers = self.open_layers(group)
                shown = self._start(layers, dict.fromkeys((x.name for x in layers), needs))
                self._fresh.setdefault(self.groups.index(group), set()).update(needs)
                handle = first.register_forward_pre_hook(self._watch(first, shown, layers, halt))
                stack.callback(handle.remove)
            with torch.inference_mode():
                for windows, call in self.stream.inputs(self.index):
                    self._window = windows.start
                    if self.origin is not None and any(need.compares for need in needs):
                        paths = [next(iter(group.layers.values())) for group in groups]
                        self._before = self.origin.inputs(windows, paths)
                    halt.run(call, self.module)
        self._before = {}
        lend(map(self.open_layers, groups))

    @contextmanager
    def _watching(self, needs: Collection[Stat]) -> Iterator[None]:
        """Let the statistics that want to see through attention and MLP do so while it is open."""
        watching = [need for need in needs if need.watches]
        if not watching:
            yield
            return
        weights: dict[str, Tensor] = {}
        if any(need.weighted for need in watching):
            found = {path: self.weighting.of(path) for path in self.linears}
            weights = {path: weight for path, weight in found.items() if weight is not None}
        with watched(self.module, self.name, self.groups, weights) as self._trace:
            yield
        self._trace = _untraced

    def _start(self, layers: Sequence[Layer], needs: Mapping[str, Sequence[Stat]]) -> list[Shown]:
        """Empty sums in the stats of some layers of one group; who is shown what."""
        columns, device = layers[0].weight.shape[1], self.stream.device
        shared: dict[Stat, Stat] = {}
        shown = []
        for layer in layers:
            own: dict[Stat, Stat] = {}
            for need in needs[layer.name]:
                sums = own if need.own else shared
                if need not in sums:
                    sums[need] = need.start(columns, device)
                layer.stats[need] = sums[need]
            if own:
                asked = any(need.weighted for need in own)
                shown.append(Shown.of(layer, own, self.weighting.counted(layer) if asked else None))
        asked = any(need.weighted for need in shared)
        weights = self.weighting.mean(layers) if asked else None
        return [Shown.of(layers[0], shared, weights), *shown]

    def _watch(
        self, linear: nn.Linear, shown: Sequence[Shown], layers: Sequence[Layer], halt: Halt
    ) -> Callable[..., None]:
        """A hook that shows the input of `linear`, that of `layers`, to statistics, row by row."""
        owner = self._owner(linear)
        if owner is not None:
            for layer in layers:
                layer.counts["tokens"] = 0.0
        path = next(name for name, one in self.linears.items() if one is linear)

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = self._seen(args[0], owner)
            if owner is None:  # rows of experts may be routed differently
                seen = seen._replace(original=self._before.get(path))
            else:
                for layer in layers:
                    layer.counts["tokens"] += len(seen.x)
            for one in shown:
                one.show(seen, self._trace)
            halt.shown()

        return hook

    def _owner(self, linear: nn.Linear) -> Experts | None:
        """The experts that `linear` belongs to: they know which tokens its rows are."""
        for module in self.module.modules():
            if isinstance(module, Experts) and any(linear is m for m in module.modules()):
                return module
        return None

    def _seen(self, x: Tensor, owner: Experts | None) -> Seen:
        """What there is to see of an input [..., in] of the batch on its way."""
        x, length = x.reshape(-1, x.shape[-1]), self.stream.length
        if owner is not None:
            tokens = owner.routed
        else:
            # rows are tokens in order unless the model re-arranged them
            tokens = torch.arange(x.shape[0], device=x.device)
            tokens = tokens if x.shape[0] % length == 0 else None
        if tokens is None:
            return Seen(x, None, length)
        whole = None if owner is not None else ((1.0, length),)
        half = (tokens // length + self._window) % 2
        return Seen(x, tokens % length, length, half, stretches=whole)

    def commit(self, group: ResolvedGroup) -> None:
        """Put the sum of parts into the module, so that later passes see it.

        Parts that go beside codes which are still to come are nearly nothing: until then the weight
        stays.
        """
        changed = False
        for layer in self.open_layers(group):
            if layer.coded:
                changed = True
                linear = self.linears[layer.name]
                # a new tensor: the old one may be mapped onto the source file
                linear.weight.data = layer.dense().to(linear.weight.dtype)
            for stat in layer.stats.values():
                stat.forget()
        # it takes milliseconds and waits for the end of the block where little was freed
        if sum(layer.weight.nbytes for layer in self.open_layers(group)) >= TRIMMED:
            trim_heap()
        if self.order == "group" and changed:
            self._forget(self.groups.index(group) + len(self.alike(group)))

    def enter(self, stream: Stream) -> None:
        """`stream` replaces the one at hand: what enters this block, or the first that is held."""
        self.stream = self.weighting.stream = stream
        self._forget(0)

    def close_stage(self) -> None:
        """What was observed behind a changed group is stale from here on."""
        changed = [
            i
            for i, group in enumerate(self.groups)
            if any(x.coded for x in self.open_layers(group))
        ]
        if changed:
            self._forget(changed[0] + 1)

    def alike(self, group: ResolvedGroup) -> list[ResolvedGroup]:
        """The group and its like behind it, which do not read what it changes.

        Neighbours of one kind and equal roles are experts.
        """

        def like(other: ResolvedGroup) -> bool:
            return other.kind == group.kind and other.layers.keys() == group.layers.keys()

        return list(takewhile(like, self.groups[self.groups.index(group) :]))

    def _forget(self, start: int) -> None:
        """Drop the statistics of the groups from number `start` on."""
        for number in range(start, len(self.groups)):
            self._fresh.pop(number, None)
            for layer in self.open_layers(self.groups[number]):
                layer.stats.clear()

    def error(self) -> float:
        """Relative squared error of the weights of all layers that have parts."""
        layers = [layer for layer in self.layers.values() if layer.parts]
        total = sum(float(layer.weight.square().sum()) for layer in layers)
        return sum(float(x.residual().square().sum()) for x in layers) / total if total else 0.0

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
