"""The table of families against what trace() finds, and its fold sources against the modules."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aptq.model.archs import ARCHS, Arch, Group, table_entry
from aptq.model.dry import Call, record
from aptq.model.layout import expand
from aptq.model.model import Model
from aptq.model.skeleton import build_skeleton
from aptq.model.trace import trace
from tests.tiny import TABLE, TINY, tiny_tokens


def _plain(arch: Arch) -> list[tuple[str, dict[str, str]]]:
    return [(group.kind, group.linears) for group in arch.groups]


def test_the_tests_cover_the_table() -> None:
    assert {TINY[name]().model_type for name in TABLE} == set(ARCHS)


@pytest.mark.parametrize("name", TABLE)
def test_entry_equals_trace(name: str) -> None:
    config = TINY[name]()
    entry = table_entry(config)
    assert entry is not None
    found = trace(build_skeleton(config, torch.float32), config, entry.joined)
    assert _plain(found) == _plain(entry)
    for place in ("blocks", "embed", "norm", "head", "attention", "norm_shift", "ignore"):
        assert getattr(found, place) == getattr(entry, place), place


def _loaded(folder: Path) -> tuple[Model, nn.Module, Call]:
    model = Model.open(folder)
    model.load_outer()
    skeleton: PreTrainedModel = model.skeleton
    call = record(skeleton, model.arch.blocks, tiny_tokens())[0]
    return model, model.load(0), call


def _input_of(block: nn.Module, group: Group, call: Call) -> list[Tensor]:
    """What the first linear of a group reads in one forward of the block."""
    seen: list[Tensor] = []
    linear = block.get_submodule(next(iter(group.linears.values())))
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        call.run(block)
    handle.remove()
    return seen


@pytest.mark.parametrize("name", TABLE)
def test_sources_scale_the_input_of_their_group(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """Doubling the rows of a source doubles what the group reads: it may be folded into."""
    model, block, call = _loaded(folder_of(name))
    shift = model.arch.norm_shift
    for group in expand(model.arch.groups, block):
        if group.source is None:
            continue
        before = _input_of(block, group, call)
        other = copy.deepcopy(block)
        source = other.get_submodule(group.source)
        with torch.no_grad():
            for key, tensor in source.named_parameters():
                moved = shift if key == "weight" and not isinstance(source, nn.Linear) else 0.0
                tensor.add_(moved).mul_(2).sub_(moved)
        after = _input_of(other, group, call)
        assert before, group
        for one, two in zip(before, after, strict=True):
            torch.testing.assert_close(two, 2 * one)


def test_an_entry_holds_only_for_its_config() -> None:
    config = TINY["opt"]()
    config.do_layer_norm_before = False
    assert table_entry(config) is None
