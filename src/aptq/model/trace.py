"""Find the groups of an unknown family: which linears receive the very same input tensor.

A short forward of the empty model records what every block is called with; then one random
block of each structure runs with hooks.  No stored weight is read.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from aptq.model.archs import Arch, Group
from aptq.model.dry import Call, Dry, dry_pass, fill, foreign
from aptq.model.layout import linears
from aptq.model.naming import kinds, role
from aptq.model.normalise import Experts, normalise

# Relative difference of a block's output before and after normalisation that rounding explains.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Input(NamedTuple):
    """Identity of an input: the same memory and content, whatever its leading dimensions."""

    address: int
    elements: int
    columns: int
    version: int


def signature(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks of equal structure: classes and parameter shapes by name."""
    return tuple(
        (
            path,
            type(module),
            *((n, tuple(p.shape)) for n, p in module._parameters.items() if p is not None),
        )
        for path, module in block.named_modules()
    )


def trace(
    skeleton: PreTrainedModel,
    config: PreTrainedConfig,
    joined: Mapping[str, tuple[str, ...]] | None = None,
) -> Arch:
    """The Arch of a model on meta, found by running it on random weights.

    `joined` names fused linears to split first (the table's; unknown families have none).
    Raises ValueError, by model type, where blocks exchange more than hidden states, where fused
    weights are of an unknown form, or where normalisation would change the function.
    """
    joined = joined or {}
    dry = dry_pass(skeleton, config)
    groups, ignore = _trace_blocks(skeleton.get_submodule(dry.blocks), dry, joined, config)
    return _arch(dry, tuple(groups), dict(joined), tuple(ignore))


def _trace_blocks(
    blocks: nn.Module, dry: Dry, joined: Mapping[str, tuple[str, ...]], config: PreTrainedConfig
) -> tuple[list[Group], list[str]]:
    """Groups of all kinds of blocks, and modules to leave alone."""
    groups: list[Group] = []
    ignore: dict[str, None] = {}
    known = set()
    for index, block in enumerate(blocks.children()):
        key = signature(block)
        if key not in known:
            known.add(key)
            name, call = f"{dry.blocks}.{index}", dry.calls[index]
            traced = _normalised(copy.deepcopy(block), call, joined, config, name)
            ignore.update(dict.fromkeys(_routers(traced)))
            _merge(groups, _groups(traced, call, joined, set(ignore)), config)
    return groups, list(ignore)


def _arch(
    dry: Dry, groups: tuple[Group, ...], joined: dict[str, tuple[str, ...]], ignore: tuple[str, ...]
) -> Arch:
    attention = [p.split(".")[0] for g in groups for p in g.linears.values() if "att" in p]
    return Arch(
        groups=groups,
        blocks=dry.blocks,
        embed=dry.embed,
        norm=dry.norm,
        head=dry.head,
        # Hybrid families also have linear attention; the softmax one is what later stages watch.
        attention=min(attention, key=lambda name: "linear" in name, default=""),
        joined=joined,
        norm_shift=dry.norm_shift,
        ignore=ignore,
    )


@torch.no_grad()
def _normalised(
    block: nn.Module,
    call: Call,
    joined: Mapping[str, tuple[str, ...]],
    config: PreTrainedConfig,
    name: str,
) -> nn.Module:
    """The block with random weights, normalised; checks that this did not change its output."""
    fill(block, torch.Generator().manual_seed(0))
    with foreign(config, f"{name} ({type(block).__name__})"):
        before = call.run(block)
    normalise(block, joined, config, name)
    after = call.run(block)
    error = float((after - before).float().norm() / before.float().norm())
    if not error <= _ROUNDING[before.dtype]:
        raise ValueError(
            f"model type {config.model_type!r} holds fused weights of an unknown form\n"
            f"{name} ({type(block).__name__}): its output changes by {error:.1%} when they are "
            "split\nchoose another model: this one cannot be compressed correctly"
        )
    return block


@torch.no_grad()
def _groups(
    block: nn.Module, call: Call, joined: Mapping[str, tuple[str, ...]], ignore: set[str]
) -> list[Group]:
    """Linears of one normalised block by input, in order of their first call."""
    found: dict[_Input, dict[str, None]] = {}
    alive: list[Tensor] = []  # keeps inputs from being freed and their addresses reused
    handles = []
    stars = _stars(block)

    def seen(path: str, x: Tensor) -> None:
        alive.append(x)
        key = _Input(x.data_ptr(), x.numel(), x.shape[-1], x._version)
        found.setdefault(key, {})[path] = None

    for path, linear in linears(block).items():
        if path in ignore:
            continue
        name = re.sub(stars, r"\1.*", path) if stars else path
        hook = _hook(seen, name)
        handles.append(linear.register_forward_pre_hook(hook, with_kwargs=True))
    call.run(block)
    for handle in handles:
        handle.remove()
    inputs = list(dict.fromkeys(tuple(paths) for paths in found.values()))
    return [
        Group(kind, {role(path, paths, joined): path for path in paths})
        for kind, paths in zip(kinds(inputs, joined), inputs, strict=True)
    ]


def _hook(seen: Any, path: str) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen(path, args[0] if args else kwargs["input"])

    return hook


def _expert_lists(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Paths of lists of like modules, and their lengths: experts, fused before or not."""
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            yield path, module.num_experts
        elif isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            yield path, len(module)


def _stars(block: nn.Module) -> str:
    """A pattern of what becomes "experts.*"; empty where there are no experts."""
    paths = "|".join(re.escape(path) for path, _ in _expert_lists(block))
    return rf"^({paths})\.\d+" if paths else ""


def _routers(block: nn.Module) -> list[str]:
    """Modules that choose: one row for every expert beside it, or a single row."""
    found = [path for path, linear in linears(block).items() if linear.out_features == 1]
    for path, length in _expert_lists(block):
        parent = path.rpartition(".")[0]
        for name, module in block.named_modules():
            beside = name.startswith(f"{parent}.".lstrip(".")) and not name.startswith(f"{path}.")
            rows = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 2}
            if beside and rows == {length}:
                found.append(name)
    return found


def _merge(groups: list[Group], more: list[Group], config: PreTrainedConfig) -> None:
    """Insert the groups of another kind of block, keeping forward order."""
    place = 0
    fresh: set[str] = set()
    for group in more:
        paths = set(group.linears.values())
        hits = [i for i, other in enumerate(groups) if paths & set(other.linears.values())]
        if len(hits) > 1 or paths & fresh:
            raise ValueError(
                f"model type {config.model_type!r} calls its linears with changing inputs\n"
                f"{', '.join(sorted(paths))} read one input in one place and several in another\n"
                "choose another model, or describe the family in aptq/model/archs.py"
            )
        fresh |= paths
        if not hits:
            groups.insert(place, group)
            place += 1
        else:
            old = groups[hits[0]]
            groups[hits[0]] = Group(old.kind, {**old.linears, **group.linears})
            place = hits[0] + 1
