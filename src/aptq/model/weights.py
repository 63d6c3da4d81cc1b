"""The stored tensors of a model folder, and how transformers maps them onto one block.

Shards are memory-mapped: reading a tensor costs file cache, no second copy in memory.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from aptq.core.reading import LISTS, parse_json, printable, read_json
from aptq.model.ahead import Ahead
from aptq.model.sources import refuse

OUTER = -1  # the index under which everything outside the blocks is loaded
# Buffers that old checkpoints still carry and current modules compute themselves.
_OBSOLETE = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attention\.bias|masked_bias)$")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names and how many more there are."""
    names = sorted(map(printable, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Shards:
    """All safetensors files of a folder, opened and cross-checked against the index.

    `shapes` and `dtypes` hold what the headers say.  Raises ValueError for a missing, cut or
    hostile file and for an index that disagrees with the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._read_index(index)
        else:
            self._read_shard(folder / "model.safetensors")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first floating tensor; None where there is none."""
        kinds = (_FLOATS[kind] for kind in self.dtypes.values() if kind in _FLOATS)
        return next(kinds, None)

    def slice(self, name: str) -> Any:
        """A lazy slice of a stored tensor; [...] reads it."""
        return self._open[name].get_slice(name)

    def read(self, name: str) -> Tensor:
        """The stored tensor, memory-mapped."""
        tensor: Tensor = self._open[name].get_tensor(name)
        return tensor

    def _read_index(self, index: Path) -> None:
        try:
            where: dict[str, str] = read_json(index, LISTS)["weight_map"]
            where = {str(name): str(shard) for name, shard in where.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cannot read the list of shards\n{index}: {error!r}\ncopy the file again"
            ) from error
        for shard in sorted(set(where.values())):
            inside = {name for name, file in where.items() if file == shard}
            path = self.folder / shard
            if Path(shard).name != shard or len(shard) > 200 or not path.is_file():
                raise ValueError(
                    f"a shard of the model is missing\n{printable(path)} with {len(inside)} "
                    f"tensors: {listed(inside)}\ncopy or download the file again"
                )
            found = self._read_shard(path)
            if found != inside:
                raise ValueError(
                    f"the index and a shard disagree\n{path}: {len(inside - found)} tensors "
                    f"missing, {len(found - inside)} unlisted: {listed(inside ^ found)}\n"
                    "copy or download the model again"
                )

    def _read_shard(self, path: Path) -> set[str]:
        try:
            shard: Any = safe_open(path, framework="pt", device="cpu")
            names = set(shard.keys())
            for name in names:
                header = shard.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = header.get_dtype()
                self._open[name] = shard
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"a weight file is damaged or cut off\n{path}: {_sizes(path)} ({error})\n"
                "copy or download the file again"
            ) from error
        return names


def _sizes(path: Path) -> str:
    """Actual and, where the header can be read, expected bytes of a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size, 100_000_000):
            return f"{size:,} bytes, the header claims {length:,}"
        try:
            entries: dict[str, Any] = parse_json(file.read(length))
            ends = [e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"]
            return f"{size:,} bytes, {8 + length + max(ends, default=0):,} expected"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{size:,} bytes, the header is no valid JSON"


class Loader:
    """Fills blocks of a skeleton from shards through transformers' conversion tables.

    On creation every stored name is mapped once, and names and shapes are checked against the
    skeleton: ValueError for missing, unknown or misshapen tensors and for packed integers.
    """

    def __init__(
        self, skeleton: PreTrainedModel, shards: Shards, blocks: str, dtype: torch.dtype
    ) -> None:
        self.skeleton, self.shards, self.dtype = skeleton, shards, dtype
        self._block = re.compile(rf"^{re.escape(blocks)}\.(\d+)\.")
        self._stored: dict[int, list[str]] = defaultdict(list)
        self.fills: dict[str, list[str]] = {}  # stored name -> names in the skeleton
        wanted = skeleton.state_dict()
        produced = self._map(wanted)
        self._check(wanted, produced)
        self.tied = self._tied(produced)
        self._ahead = Ahead(self._inside, shards.read)

    def _inside(self, index: int) -> list[str]:
        """Stored names of a block; none for one that there is not."""
        return self._stored[index] if index != OUTER and index in self._stored else []

    def load(self, index: int, device: str | torch.device) -> None:
        """Give the parameters of block `index` (or OUTER) real values on `device`."""
        plan = self.skeleton._get_dtype_plan(self.dtype)
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=plan,
            device_map={"": device},
            weight_mapping=get_model_conversion_mapping(self.skeleton),
        )
        ahead = index != OUTER and torch.device(device).type == "cuda"
        held = self._ahead.take(index) if ahead else {}
        names = self._stored[index]
        slices = {name: held[name] if held else self.shards.slice(name) for name in names}
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(self.skeleton, slices, config)
        finally:
            if bars:
                logging.enable_progress_bar()
        if info.conversion_errors or info.mismatched_keys or info.error_msgs:
            wrong = [*info.conversion_errors, *(str(entry) for entry in info.mismatched_keys)]
            raise ValueError(
                f"stored tensors do not fit the architecture\n{self.shards.folder}: "
                f"{listed([*wrong, *info.error_msgs])}\ncheck config.json against the weights"
            )
        if ahead:
            self._ahead.start(index)

    def _map(self, wanted: dict[str, Tensor]) -> dict[str, str]:
        """Sort stored names by block; name in the skeleton -> (one) stored name behind it."""
        mapping = get_model_conversion_mapping(self.skeleton)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        targets = {p: c.target_patterns for c in converters for p in c.source_patterns}
        prefix = self.skeleton.base_model_prefix
        produced: dict[str, str] = {}
        unknown: set[str] = set()
        misshapen: list[str] = []
        for name, shape in self.shards.shapes.items():
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if renamed not in wanted and name in wanted:
                renamed, pattern = rename_source_key(name, [], [], prefix, wanted)
            if renamed not in wanted:
                unknown.add(name)
                continue
            match = self._block.match(renamed)
            self._stored[int(match[1]) if match else OUTER].append(name)
            if pattern is not None:
                # Shapes of converted tensors are known only when they are loaded.
                first, *others = targets[pattern]
                self.fills[name] = [renamed, *(renamed.replace(first, other) for other in others)]
            elif shape != (expected := tuple(wanted[renamed].shape)):
                misshapen.append(f"{name} {list(shape)} stored, {list(expected)} expected")
            produced.update(dict.fromkeys(self.fills.setdefault(name, [renamed]), name))
        self._check_unknown(unknown)
        if misshapen:
            refuse(
                "a stored tensor has another shape than config.json says",
                f"{self.shards.folder}: {len(misshapen)} tensors, {listed(misshapen)}",
                "use the config.json that belongs to these weights",
            )
        return produced

    def _check_unknown(self, unknown: set[str]) -> None:
        ignored = [re.compile(p) for p in self.skeleton._keys_to_ignore_on_load_unexpected]
        ignored.append(_OBSOLETE)
        unknown = {name for name in unknown if not any(p.search(name) for p in ignored)}
        if unknown:
            raise ValueError(
                f"stored tensors have no place in {type(self.skeleton).__name__}\n"
                f"{self.shards.folder}: {len(unknown)} tensors, {listed(unknown)}\n"
                "use the config.json that belongs to these weights"
            )

    def _check(self, wanted: dict[str, Tensor], produced: dict[str, str]) -> None:
        ignored = [re.compile(p) for p in self.skeleton._keys_to_ignore_on_load_missing]
        missing = wanted.keys() - produced.keys()
        for pair in self.skeleton.all_tied_weights_keys.items():
            if not missing.issuperset(pair):  # the other one of the two is stored
                missing.difference_update(pair)
        missing = {name for name in missing if not any(p.search(name) for p in ignored)}
        if missing:
            raise ValueError(
                f"tensors of the model are missing\n{self.shards.folder}: {len(missing)} "
                f"missing, {listed(missing)}\ncopy or download the model again"
            )
        kinds = self.shards.dtypes
        packed = {n for t, n in produced.items() if wanted[t].is_floating_point()}
        packed = {name for name in packed if kinds[name] not in _FLOATS}
        if packed:
            raise ValueError(
                f"the weights are already quantized\n{self.shards.folder}: {len(packed)} tensors "
                f"of type {listed({kinds[name] for name in packed})}, {listed(packed)}\n"
                "start from the original bf16, fp16 or fp32 model"
            )

    def _tied(self, produced: dict[str, str]) -> dict[str, str]:
        """Names that share one tensor, target -> source; different copies on disk are not tied."""
        ties = dict(self.skeleton.all_tied_weights_keys)
        for pair in list(ties.items()):
            stored = [self.shards.read(produced[name]) for name in pair if name in produced]
            if len(stored) == 2 and not torch.equal(*stored):
                del ties[pair[0]]
        return ties


class Absent:
    """In the place of a Loader where there are no weights: everything but loading works."""

    def __init__(self, skeleton: PreTrainedModel, folder: Path) -> None:
        self.folder, self.tied = folder, dict(skeleton.all_tied_weights_keys)

    def load(self, index: int, device: str | torch.device) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(
            f"the folder holds no weights\n{self.folder}: config.json only, good for planning\n"
            "give a folder with model.safetensors"
        )


def check_finite(prefix: str, module: nn.Module, tolerated: Set[str] = frozenset()) -> None:
    """Raise ValueError where a parameter of `module` that is not tolerated holds NaN or Inf."""
    for name, tensor in module.named_parameters(prefix=prefix):
        if name not in tolerated:
            check_finite_tensor(name, tensor)


def count_nonfinite(tensor: Tensor, dtype: torch.dtype) -> int:
    """Values that are NaN or Inf, also after the cast to `dtype`."""
    # One pass without a mask in memory: NaN spreads to both ends, Inf is one of them.
    ends = tensor.detach().aminmax() if tensor.numel() and tensor.is_floating_point() else ()
    if all(bool(end.to(dtype).isfinite()) for end in ends):
        return 0
    return tensor.numel() - int(tensor.to(dtype).isfinite().sum())


def check_finite_tensor(name: str, tensor: Tensor) -> None:
    """Raise ValueError where a weight holds NaN or Inf, also after the cast to the dtype."""
    if bad := count_nonfinite(tensor, tensor.dtype):
        refuse(
            f"a weight is not finite in {tensor.dtype}",
            f"{name}: {bad} of {tensor.numel()} values are NaN or Inf",
            "repair or download the model again, or choose a dtype with a wider range",
        )
