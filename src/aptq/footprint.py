"""Memory of a model that generates on a GPU: weights, cache and work, before a weight is read.

The model runs on the meta device, where tensors have sizes but no content, and every tensor that
appears and goes is counted: so the figures follow what the code of the family really allocates.
"""

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from aptq.core.plan import Plan, Target
from aptq.model.model import Model
from aptq.model.normalise import normalise_model
from aptq.model.skeleton import build_skeleton
from aptq.runtime.linear import PackedLinear, empty_parts
from aptq.store.predict import outline

STEP = 512  # bytes: torch's CUDA allocator rounds every tensor up to a multiple of it
LIBRARY = 32 << 20  # bytes: what cuBLAS takes for itself on Hopper (8 MiB before): torch's default
SPARE = 0.06  # of the device: left free for the holes that the allocator cannot fill; 4.4 % seen


@dataclass(frozen=True, slots=True)
class Running:
    """Bytes on the GPU at the peak of generating; the CUDA context comes on top."""

    weights: int  # everything stored, as the kernels hold it
    cache: int  # keys and values of the whole context
    work: int  # activations, decoded tiles, workspace of the library

    @property
    def peak(self) -> int:
        """What torch.cuda.max_memory_allocated() would say."""
        return self.weights + self.cache + self.work


def running(model: Model, plan: Plan, context: int, batch: int = 1) -> Running:
    """Memory while `model` under `plan` reads context - 1 tokens at once and writes the last one.

    Raises ValueError for families whose memory depends on more than shapes.
    """
    targets = {name: (target,) for name, target in plan.targets.items()}
    return Running(weight_bytes(model, plan), *_beside(model, targets, context, batch))


def weight_bytes(model: Model, plan: Plan) -> int:
    """Bytes of all stored tensors in the memory of a GPU."""
    shards = outline(model, plan).shards
    return sum(
        _rounded(dtype.itemsize * torch.Size(shape).numel())
        for specs in shards.values()
        for dtype, shape in specs.values()
    )


def weight_limit(
    model: Model, candidates: Sequence[Target], device_bytes: int, context: int, batch: int
) -> int:
    """What weight_bytes() may be at most, whichever of the candidates each layer gets.

    Raises ValueError as `running` does; may be negative.
    """
    names = [*model.shapes, *model.outer_shapes]
    targets = dict.fromkeys(names, tuple(candidates))
    taken = sum(_beside(model, targets, context, batch))
    return int(device_bytes * (1 - SPARE)) - taken


def _beside(
    model: Model, targets: Mapping[str, Sequence[Target]], context: int, batch: int
) -> tuple[int, int]:
    """(cache, work) in bytes, where layers may have any of their `targets`."""
    if model.head_tied and model.arch.embed in targets:
        targets = {**targets, model.arch.head: targets[model.arch.embed]}
    skeleton = _hollow(model, targets, (batch * max(context - 1, 1), batch))
    ledger = Ledger([*skeleton.parameters(), *skeleton.buffers()])
    try:
        with torch.no_grad(), Fused(), ledger:
            tokens = torch.zeros(batch, max(context - 1, 1), dtype=torch.long, device="meta")
            held = _step(skeleton, tokens, None)
            held = _step(skeleton, tokens[:, :1], held)
            nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    except (RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the memory of a running {model.config.model_type!r} cannot be computed\n"
            f"its work depends on more than shapes: {reason}\n"
            "give the size of the checkpoint instead, such as 4bpw or 4.2GiB"
        ) from error
    return nbytes, ledger.peak - nbytes + LIBRARY


def _step(skeleton: PreTrainedModel, tokens: Tensor, past: Any) -> Any:
    """One call as generate() makes it; the cache behind it."""
    output = skeleton(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
    return output.past_key_values


def _hollow(
    model: Model, targets: Mapping[str, Sequence[Target]], rows: Sequence[int]
) -> PreTrainedModel:
    """The runtime's module tree on meta, with linears that only take the memory of kernels."""
    config = copy.deepcopy(model.config)
    skeleton = build_skeleton(config, model.dtype).to("meta")
    normalise_model(skeleton, config.get_text_config(decoder=True))
    for name, linear in [*skeleton.named_modules()]:
        if isinstance(linear, nn.Linear) and name in targets:
            packed = tuple(target for target in targets[name] if not target.kept)
            if packed:
                skeleton.set_submodule(name, _Hollow(linear, packed, rows))
    return skeleton


class _Hollow(nn.Module):
    """Allocates what a packed layer would at its peak, and its output.  Holds no weight.

    The peaks of any of the targets, for inputs of each of the numbers of `rows`, are found here:
    a ledger that counts the model must not count these trials.
    """

    def __init__(self, linear: nn.Linear, targets: Sequence[Target], rows: Sequence[int]) -> None:
        super().__init__()
        self.width, dtype = linear.out_features, linear.weight.dtype
        shape, bias = (self.width, linear.in_features), linear.bias is not None
        self.peaks = {n: max(_kernel_peak(t, shape, bias, n, dtype) for t in targets) for n in rows}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        work = torch.empty(self.peaks[len(rows)], dtype=torch.uint8, device="meta")
        del work  # the output is a part of it
        return x.new_empty(*x.shape[:-1], self.width)


@cache
def _kernel_peak(
    target: Target, shape: tuple[int, int], bias: bool, rows: int, dtype: torch.dtype
) -> int:
    """Bytes that a packed layer takes for `rows` inputs, its output included."""
    extra = torch.empty(shape[0], dtype=dtype, device="meta") if bias else None
    packed = PackedLinear(empty_parts(target, shape), extra)
    packed.prepare(dtype)
    x = torch.empty(rows, shape[1], dtype=dtype, device="meta")
    ledger = Ledger([x, *packed.parameters(), *packed.buffers()])
    with torch.no_grad(), ledger:
        packed(x)
    return ledger.peak


def _rounded(nbytes: int) -> int:
    return -(-nbytes // STEP) * STEP


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that appear while it is active, and the peak of their sum.

    Tensors in `known` (weights, inputs) are there already and do not count.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._held = {storage._cdata: storage for storage in map(Tensor.untyped_storage, known)}
        self._seen: dict[int, object] = dict(self._held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, _rounded(storage.nbytes())
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size


class Fused(TorchFunctionMode):
    """Attention as the fused GPU kernels do it: never a matrix of tokens by tokens.

    On meta torch would take it apart.  A mask, where there is one, is counted where it is made.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention by its output and its log-sums."""
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        same = query.shape[-1] == value.shape[-1]  # then the output also lies in memory like q
        shape = (*query.shape[:-1], value.shape[-1])
        out = torch.empty_like(query) if same else query.new_empty(shape)
        del sums
        return out
