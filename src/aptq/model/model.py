"""Model: a causal language model on disk, opened block by block.

The skeleton lives on `meta`; load(i) gives one block real weights and normalises it, unload(i)
frees it.  Nothing of the source is ever executed or unpickled.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from aptq.core.parts import Part
from aptq.core.plan import Plan, Shapes
from aptq.model.archs import Arch, Group, table_entry
from aptq.model.layout import Coverage, ResolvedGroup, expand, linears, resolve, uncovered
from aptq.model.normalise import normalise
from aptq.model.outer import check_outer, decoded, is_tied, outer_shapes
from aptq.model.skeleton import build_skeleton
from aptq.model.sources import Source, read_config, read_tokenizer, refuse
from aptq.model.sources import resolve as find
from aptq.model.trace import signature, trace
from aptq.model.weights import OUTER, Absent, Loader, Shards, check_finite, check_finite_tensor


@dataclass(frozen=True, slots=True)
class _Layout:
    """What one kind of block looks like after normalisation."""

    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, int]]  # path below the block -> (out, in), in forward order
    grouped: int
    kept: int


class Model:
    """A causal language model whose weights stay on disk until their block is due.

    `skeleton` is the transformers model on meta, `shapes` the (out, in) of every linear in the
    groups of all blocks by full name, `outer_shapes` those of the embedding and an untied head,
    `tied` names that share one tensor (target -> source).
    """

    def __init__(
        self,
        source: Source,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        shards: Shards | None,
        partial: bool = False,
    ) -> None:
        self.source, self.config, self.dtype = source.name, config, dtype
        self.skeleton = build_skeleton(config, dtype, source.folder / "config.json")
        self._source, self._partial = source, partial
        self.tolerated: frozenset[str] = frozenset()  # parameters that may hold NaN and Inf
        self.arch: Arch = table_entry(config) or trace(self.skeleton, config)
        self._blocks = self.skeleton.get_submodule(self.arch.blocks)
        assert isinstance(self._blocks, nn.ModuleList), (self.arch.blocks, type(self._blocks))
        self._loader = (
            Absent(self.skeleton, source.folder)
            if shards is None
            else Loader(self.skeleton, shards, self.arch.blocks, dtype)
        )
        self.tied = self._loader.tied
        if len(self.tied) < len(self.skeleton.all_tied_weights_keys):
            self._untie()
        self._empty: dict[int, nn.Module] = {}
        self._layouts = self._lay_out()
        self.shapes: Shapes = {
            f"{self.block_name(index)}.{path}": shape
            for index, layout in enumerate(self._layouts)
            for path, shape in layout.shapes.items()
        }
        self.outer_shapes = outer_shapes(self.skeleton, self.arch, self.tied)
        self._replaced: dict[str, Sequence[Part]] = {}

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        cache: Path | None = None,
        partial: bool = False,
    ) -> "Model":
        """Open a Hugging Face folder, a hub id or a .gguf file; reads headers only.

        `dtype` (default: that of the source) is the dtype of loaded weights and activations,
        `cache` the folder for sources that are converted first (.gguf, GPTQ, compressed-tensors).
        `partial` allows blocks with more than 5 % of their weights outside all known linears.
        Raises ValueError, in three lines, for every source that cannot be compressed correctly.
        """
        found = find(source, revision, cache, dtype)
        config = read_config(found.folder)
        shards = Shards(found.folder)
        if dtype is None:
            dtype = config.dtype or shards.dtype
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            refuse(f"cannot compute in {dtype}", str(found.folder), "pass bf16, fp16 or fp32")
        return cls(found, config, dtype, shards, partial)

    @classmethod
    def outline(
        cls, source: str | Path, *, revision: str | None = None, partial: bool = False
    ) -> "Model":
        """Like `open`, but weights need not be there: a folder with config.json is enough.

        Of a hub id only the small files are fetched.  Without weights the dtype is the config's,
        names are tied as it says, and loading raises ValueError.
        """
        path = Path(source).expanduser()
        if path.is_file() or path.suffix == ".gguf" or any(path.glob("model.safetensors*")):
            return cls.open(source, revision=revision, partial=partial)
        found = find(source, revision, None, weights=False)
        config = read_config(found.folder)
        return cls(found, config, config.dtype or torch.bfloat16, None, partial)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def folder(self) -> Path:
        """The local folder with config.json and safetensors (of a .gguf: the converted one)."""
        return self._source.folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the source; ValueError where it has none."""
        return read_tokenizer(self._source.folder)

    def block_name(self, index: int) -> str:
        """Full name of a block, "model.layers.3"."""
        return f"{self.arch.blocks}.{index}"

    @property
    def head_tied(self) -> bool:
        """Is the head's weight the embedding's?"""
        return is_tied(self.tied, self.arch.embed, self.arch.head)

    def check(self, plan: Plan) -> None:
        """Raise ValueError unless `plan` names all of `shapes` and else only of `outer_shapes`."""
        check_outer(plan, self.skeleton, self.arch, self.outer_shapes)
        plan.check(self.shapes, self.outer_shapes)

    def files(self) -> list[Path]:
        """Tokenizer, chat template and generation config of the source, to be carried over."""
        return self._source.files()

    def groups(self, index: int) -> list[ResolvedGroup]:
        """The groups of block `index` in forward order, with full names."""
        return resolve(self._layouts[index].groups, self.block_name(index))

    @cached_property
    def coverage(self) -> Coverage:
        """Parameter counts inside groups, elsewhere in blocks, and outside the blocks."""
        outer = sum(tensor.numel() for _, tensor in self._outer(unique=True))
        grouped = sum(layout.grouped for layout in self._layouts)
        return Coverage(grouped, sum(layout.kept for layout in self._layouts), outer)

    def stored(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Every stored tensor, mapped, and the parameters of the skeleton that it fills."""
        if isinstance(self._loader, Loader):
            for name, filled in self._loader.fills.items():
                yield self._loader.shards.read(name), filled

    def load(self, index: int, device: str | torch.device = "cpu") -> nn.Module:
        """Block `index`, normalised, with real weights on `device`, in eval mode, without grad.

        On the CPU weights are memory-mapped from the source where their dtype is stored.
        Raises ValueError for tensors that are damaged, misshapen or not finite.
        """
        assert index not in self._empty, f"block {index} is loaded already"
        block = self._blocks[index]
        self._empty[index] = copy.deepcopy(block)
        try:
            self._loader.load(index, device)
            check_finite(self.block_name(index), block, self.tolerated)
            normalise(block, self.arch.joined, self.config, self.block_name(index))
        except BaseException:
            self.unload(index)
            raise
        ready: nn.Module = block.to(device).eval().requires_grad_(False)
        return ready

    def unload(self, index: int) -> None:
        """Put the empty block back; its memory is free when the caller drops it too."""
        self._blocks[index] = self._empty.pop(index)

    def release(self) -> None:
        """Unload all that is loaded: whoever loaded it has failed."""
        for index in list(self._empty):
            self.unload(index)
        self.unload_outer()

    def load_outer(self, device: str | torch.device = "cpu") -> None:
        """Give everything outside the blocks (embeddings, norm, head, rotary) real tensors."""
        self._loader.load(OUTER, device)
        for target, source in self.tied.items():
            known = [n for n in (target, source) if not self.skeleton.get_parameter(n).is_meta]
            assert known, (target, source)
            self._set(target, self.skeleton.get_parameter(known[-1]))
            self._set(source, self.skeleton.get_parameter(known[-1]))
        for name, tensor in self._outer():
            if name not in self.tolerated:
                check_finite_tensor(name, tensor)
            tensor.requires_grad_(False)
        for module, name, buffer in self._outer_buffers():
            module._buffers[name] = buffer.to(device)
        for name, parts in self._replaced.items():
            weight = nn.Parameter(decoded(parts, self.dtype).to(device), requires_grad=False)
            for path in [name, *([self.arch.head] if self.head_tied else [])]:
                self._set(f"{path}.weight", weight)

    def replace_outer(self, parts: Mapping[str, Sequence[Part]]) -> None:
        """From now on load_outer() gives these layers the sum of their parts; {} = the source's.

        Names of `outer_shapes`; the parts are kept, not copied.
        """
        assert parts.keys() <= self.outer_shapes.keys(), (list(parts), list(self.outer_shapes))
        self._replaced = dict(parts)

    def unload_outer(self) -> None:
        """Free what load_outer() loaded."""
        for name, tensor in self._outer():
            self._set(name, nn.Parameter(tensor.to("meta"), requires_grad=False))
        for target, source in self.tied.items():
            self._set(target, self.skeleton.get_parameter(source))

    def outer_names(self) -> list[str]:
        """Parameters and persistent buffers outside the blocks, tied ones once (by source)."""
        inside = f"{self.arch.blocks}."
        names = [n for n in self.skeleton.state_dict() if not n.startswith(inside)]
        return [name for name in names if name not in self.tied]

    def _outer(self, *, unique: bool = False) -> Iterator[tuple[str, Tensor]]:
        inside = f"{self.arch.blocks}."
        for name, tensor in list(self.skeleton.named_parameters(remove_duplicate=unique)):
            if not name.startswith(inside):
                yield name, tensor

    def _outer_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        inside = f"{self.arch.blocks}."
        for path, module in self.skeleton.named_modules():
            if not f"{path}.".startswith(inside):
                for name, buffer in list(module.named_buffers(recurse=False)):
                    yield module, name, buffer

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self.skeleton.get_submodule(path), leaf, parameter)

    def _untie(self) -> None:
        """Different tensors are stored for names that config.json calls tied: believe the file."""
        for target in self.skeleton.all_tied_weights_keys.keys() - self.tied.keys():
            tensor = self.skeleton.get_parameter(target)
            self._set(target, nn.Parameter(torch.empty_like(tensor), requires_grad=False))
        self.config.tie_word_embeddings = False

    def _lay_out(self) -> list[_Layout]:
        """One layout a block; blocks of equal structure share it."""
        known: dict[object, _Layout] = {}
        layouts = []
        for index, block in enumerate(self._blocks):
            key = signature(block)
            if key not in known:
                known[key] = self._layout(copy.deepcopy(block), self.block_name(index))
            layouts.append(known[key])
        return layouts

    def _layout(self, block: nn.Module, name: str) -> _Layout:
        normalise(block, self.arch.joined, self.config, name)
        groups = expand(self.arch.groups, block)
        uncovered(self.arch, groups, block, partial=self._partial)
        present = linears(block)
        paths = [path for group in groups for path in group.linears.values()]
        shapes = {p: (present[p].out_features, present[p].in_features) for p in paths}
        total = sum(tensor.numel() for tensor in block.parameters())
        grouped = sum(rows * columns for rows, columns in shapes.values())
        return _Layout(groups, shapes, grouped, total - grouped)
