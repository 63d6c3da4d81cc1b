"""A forward without blocks: records what every block of an empty model would be called with.

Everything outside the blocks is small and random here; blocks only hand on what they get.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_ROWS = 64  # of embeddings in the dry pass: token ids and positions stay below
_SHAPE = (2, 12)  # batch and length of the tokens in the dry pass


@dataclass(frozen=True, slots=True)
class Call:
    """What one block was called with; `names` are the parameter names of its forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Arguments by name, positional ones too."""
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}

    @property
    def hidden(self) -> Tensor:
        """The hidden states: by convention the first argument, [batch, length, hidden]."""
        value = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(value, Tensor), type(value)
        return value

    def at(self, hidden: Tensor) -> "Call":
        """The same call with other hidden states."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs, self.names)
        return Call((), {**self.kwargs, "hidden_states": hidden}, self.names)

    def run(self, block: Callable[..., Any]) -> Tensor:
        """Call a block with these arguments; its hidden states."""
        output = block(*self.args, **self.kwargs)
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor), type(output)
        return value


@contextmanager
def foreign(config: PreTrainedConfig, where: str) -> Iterator[None]:
    """Whatever the code of an unknown family raises becomes one ValueError for the user."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(
            f"model type {config.model_type!r} is not in the table and cannot be traced\n"
            f"{where}: {reason[0]}\n"
            "choose another model, or describe the family in aptq/model/archs.py"
        ) from e


@dataclass(frozen=True, slots=True)
class Dry:
    """Result of the dry pass: one Call a block, and where things are in the skeleton."""

    calls: list[Call]
    blocks: str
    embed: str
    norm: str
    head: str
    norm_shift: float


@torch.no_grad()
def fill(module: nn.Module, generator: torch.Generator, *, skip: str = "\0") -> None:
    """Give every parameter on meta small random values, except below the path `skip`."""
    for path, child in module.named_modules():
        if f"{path}.".startswith(f"{skip}."):
            continue
        if isinstance(child, nn.Embedding) and child.weight.is_meta and skip != "\0":
            child.padding_idx = None  # may lie beyond the few rows that are kept
            child.weight = nn.Parameter(child.weight[:_ROWS], requires_grad=False)
        for name, tensor in list(child.named_parameters(recurse=False)):
            if tensor.is_meta:
                bound = max(tensor.shape[-1:], default=1) ** -0.5
                low, high = (-1.7 * bound, 1.7 * bound) if tensor.dim() > 1 else (0.5, 1.0)
                real = torch.empty(tensor.shape, dtype=tensor.dtype)
                real.uniform_(low, high, generator=generator)
                child._parameters[name] = nn.Parameter(real, requires_grad=False)


def dry_pass(skeleton: PreTrainedModel, config: PreTrainedConfig) -> Dry:
    """Run an empty model (on meta) twice with different tokens; blocks are never computed.

    Raises ValueError by model type where a block receives more than its hidden states that
    depends on the tokens or that blocks could write to.
    """
    blocks = _find_blocks(skeleton, config)
    model = copy.deepcopy(skeleton)
    generator = torch.Generator().manual_seed(0)
    fill(model, generator, skip=blocks)
    after = _watch_outside(model, blocks)
    tokens = [torch.randint(0, _ROWS, _SHAPE, generator=generator) for _ in range(2)]
    with foreign(config, type(skeleton).__name__):
        runs = [record(model, blocks, ids) for ids in tokens]
    _check_carries(runs[0], runs[1], config)
    norm = after[-1] if after else ""
    head = model.get_output_embeddings()
    return Dry(
        calls=runs[0],
        blocks=blocks,
        embed=_name(model, model.get_input_embeddings()),
        norm=norm,
        head=_name(model, head) if head is not None else "",
        norm_shift=_norm_shift(model.get_submodule(norm), runs[0][-1].hidden) if norm else 0.0,
    )


def _find_blocks(skeleton: PreTrainedModel, config: PreTrainedConfig) -> str:
    found = [
        path
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if len(found) != 1:
        raise ValueError(
            f"model type {config.model_type!r} has no single list of blocks\n"
            f"{type(skeleton).__name__}: {len(found)} lists of {config.num_hidden_layers} blocks "
            f"{found}\nchoose another model, or describe the family in aptq/model/archs.py"
        )
    return str(found[0])


def record(model: PreTrainedModel, blocks: str, ids: Tensor) -> list[Call]:
    """What every block below the path `blocks` would be called with; none is computed.

    ids [batch, length].  Modules outside the blocks must hold real tensors.  Blocks hand on what
    they get, so the hidden states of every Call are those that enter block 0.
    """
    calls: list[Call] = []
    modules = list(model.get_submodule(blocks).children())
    for block in modules:
        names = tuple(inspect.signature(type(block).forward).parameters)[1:]
        block.forward = _handing_on(calls, names)
    try:
        with torch.no_grad():
            model.get_submodule(model.base_model_prefix)(input_ids=ids, use_cache=False)
    finally:
        for block in modules:
            del block.__dict__["forward"]
    return calls


def _handing_on(calls: list[Call], names: tuple[str, ...]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call = Call(args, kwargs, names)
        # One copy, of what enters block 0: the model may write into what a block returns.  A copy
        # for every block would make the peak grow with the depth.
        calls.append(call if calls else call.at(call.hidden.clone()))
        return call.hidden

    return forward


def _watch_outside(model: nn.Module, blocks: str) -> list[str]:
    """A list that holds, after a forward, the leaf modules that ran after the last block."""
    after: list[str] = []
    *_, last = model.get_submodule(blocks).children()
    last.register_forward_hook(lambda *_: after.clear())
    for path, module in model.named_modules():
        outside = not f"{path}.".startswith(f"{blocks}.") and not any(module.children())
        if outside and any(True for _ in module.parameters()):
            module.register_forward_hook(_noting(after, path))
    return after


def _noting(after: list[str], path: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        after.append(path)

    return hook


def _check_carries(first: list[Call], second: list[Call], config: PreTrainedConfig) -> None:
    carried: dict[str, None] = {}
    for one, two in zip(first, second, strict=True):
        if one.hidden.shape[:2] != _SHAPE or one.hidden.dim() != 3:
            shape = f"{list(one.hidden.shape)} instead of [batch, length, hidden]"
            carried[f"hidden states of shape {shape}"] = None
        others = two.values()
        for name, value in one.values().items():
            if value is not one.hidden and not _constant(value, others[name]):
                carried[name] = None
    if carried:
        raise ValueError(
            f"model type {config.model_type!r} hands more than hidden states from block to block\n"
            f"its blocks also receive {', '.join(carried)}, which depends on the tokens or on "
            "other blocks\nchoose another model: this one cannot be compressed block by block"
        )


def _constant(one: Any, two: Any) -> bool:
    """Is a block argument the same for every batch, and nothing that blocks could write to?"""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, tuple):
        return all(_constant(a, b) for a, b in zip(one, two, strict=True))
    return not isinstance(one, (MutableMapping, MutableSequence, Cache))


def _norm_shift(norm: nn.Module, hidden: Tensor) -> float:
    """1.0 where the norm multiplies by (1 + weight): it answers although its weight is zero."""
    silent = copy.deepcopy(norm)
    for tensor in silent.parameters():
        tensor.zero_()
    with torch.no_grad():
        return float(bool(silent(hidden).abs().max() > 0))


def _name(model: nn.Module, module: nn.Module) -> str:
    return str(next(path for path, other in model.named_modules() if other is module))
