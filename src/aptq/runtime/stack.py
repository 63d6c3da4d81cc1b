"""Stacking: packed layers that are seen to read the same tensor run as one product from then on."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from aptq.kernels.stacked import Share, Stacked
from aptq.kernels.triton.layer import Fused
from aptq.runtime.linear import PackedLinear


@dataclass(eq=False)
class Readers:
    """Layers that got the identical tensor with the same contents, in their order."""

    x: "weakref.ref[Tensor]"  # weak: inputs of a whole prompt shall not stay
    version: int
    layers: list[PackedLinear] = field(default_factory=list)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Readers]]:
    """While open, note which layers that can be stacked read the same tensor."""
    found: list[Readers] = []
    latest: dict[int, Readers] = {}

    def see(layer: nn.Module, args: tuple[object, ...]) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.is_inference():
            return
        readers = latest.get(id(x))
        # an id may be another tensor's by now; the reference of one that is gone gives None
        if readers is None or readers.x() is not x or readers.version != x._version:
            readers = latest[id(x)] = Readers(weakref.ref(x), x._version)
            found.append(readers)
        assert isinstance(layer, PackedLinear), type(layer)
        if layer not in readers.layers:
            readers.layers.append(layer)

    hooks = [m.register_forward_pre_hook(see) for m in model.modules() if _free(m) is not None]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def stack(found: Sequence[Readers]) -> None:
    """Join the kernels of layers that read the same; those that are joined already stay so.

    One group after the other: beside the model there is never more than the copy of one.
    """
    for readers in found:
        kinds: dict[tuple[object, ...], list[PackedLinear]] = {}
        for layer in readers.layers:
            kernel = _free(layer)
            if kernel is not None:
                kinds.setdefault(kernel.kind, []).append(layer)
        for same in kinds.values():
            kernel = _free(same[0])
            assert kernel is not None
            odd = [layer for layer in same if layer.out_features % kernel.step]
            # tiles of rows are stored as a whole, so only the last layer may end inside of one
            some = [layer for layer in same if layer not in odd] + odd[:1]
            some = some[: kernel.most]
            if len(some) > 1:
                _join(some)


def _join(layers: Sequence[PackedLinear]) -> None:
    kernels = [kernel for layer in layers if (kernel := _free(layer)) is not None]
    stacked = Stacked(kernels, [layer.bias for layer in layers])
    for index, layer in enumerate(layers):
        layer.parts[0] = Share(stacked, index)


def _free(module: nn.Module) -> Fused | None:
    """The kernel of a layer that can be stacked: nobody else reads it."""
    if type(module) is not PackedLinear:  # a tied head has the embedding's kernel
        return None
    first = module.parts[0]
    return first if isinstance(first, Fused) else None
