"""Fold: pairs of a block between which channels may be scaled without changing what it computes.

The source (a norm or a linear) gives (y - shift) A^-1 where it gave y, and its readers take A into
their columns.  Pairs come from the table of architectures; what is not exact is left out by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from aptq.core.transform import divided, multiplied, shared
from aptq.model.archs import Arch, table_entry
from aptq.model.layout import ResolvedGroup

Kind = Literal["norm", "v-o", "up-down", "q-k"]

# why a pair is left out: all reasons that there are
TRACED = "the family is traced: which module makes the input is not known"
ROUTED = "the router reads the norm too: its weights would round anew, and tokens change experts"
FUSED = "q, k and v lie interleaved in one matrix, which has no rows of v alone"
BENT = "the activation between the two is not linear in each channel"
NORMED = "a norm behind the projection takes the scale of a row out again"

# families that rotate channels 2i and 2i + 1 together; the others i and i + half of what is rotated
INTERLEAVED = ("cohere2",)


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and its readers; all paths are below the block."""

    kind: Kind
    source: str  # the norm, or the linear whose rows are divided
    readers: tuple[str, ...]  # linears whose columns are multiplied; "q-k": k, by rows
    width: int  # scales: channels of the source; "q-k": rotary pairs of the KV heads
    heads: int = 1  # KV heads; one matrix each may stand for the scales of "v-o"
    times: int = 1  # query heads that read a KV head
    norm_shift: float = 0.0  # the norm multiplies by norm_shift + weight
    shifts: bool = False  # all that a shift needs a bias for has one
    turned: Tensor | None = None  # "q-k": LongTensor [head_dim], the rotary pair of each channel

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the linears that the pair changes."""
        return self.readers if self.kind == "norm" else (self.source, *self.readers)

    def names(self, module: nn.Module) -> list[str]:
        """Parameters of the block that a fold may change."""
        return [
            f"{path}.{name}"
            for path in (self.source, *self.readers)
            for name, _ in module.get_submodule(path).named_parameters(recurse=False)
        ]

    def fold(
        self, values: Mapping[str, Tensor], factor: Tensor, shift: Tensor | None = None
    ) -> dict[str, Tensor]:
        """New values of what changes, of `values` by parameter name; differentiable.

        factor: scales [width], or [heads, d, d] of "v-o"; shift: [width], where `shifts`.
        """
        assert shift is None or self.shifts, f"{self.source} -> {self.readers} takes no shift"
        weight, bias = f"{self.source}.weight", f"{self.source}.bias"
        found = {}
        if self.kind == "norm":
            found[weight] = (values[weight] + self.norm_shift) / factor - self.norm_shift
        rows = self._rows(factor)
        if self.kind != "norm":
            found[weight] = divided(values[weight], rows)
        if bias in values:
            found[bias] = divided(values[bias] if shift is None else values[bias] - shift, rows)
        for path in self.readers:
            found |= self._read(path, values, factor, shift)
        return found

    def _rows(self, factor: Tensor) -> Tensor:
        """The factor of the source's rows."""
        if self.turned is None:
            return factor
        return shared(self._channels(factor), self.heads, self.times)

    def _channels(self, factor: Tensor) -> Tensor:
        """Scales [KV heads * head_dim] of scales by rotary pair."""
        return factor.view(self.heads, -1)[:, self.turned].flatten()

    def _read(
        self, path: str, values: Mapping[str, Tensor], factor: Tensor, shift: Tensor | None
    ) -> dict[str, Tensor]:
        """New values of one reader."""
        weight, bias = f"{path}.weight", f"{path}.bias"
        if self.kind == "q-k":
            rows = 1 / self._channels(factor)
            return {n: divided(values[n], rows) for n in (weight, bias) if n in values}
        columns = shared(factor, self.heads, self.times) if self.kind == "v-o" else factor
        found = {weight: multiplied(values[weight], columns)}
        if shift is not None:
            shift = shared(shift, self.heads, self.times)
            found[bias] = values[bias] + values[weight] @ shift
        return found


def foldable(
    module: nn.Module, name: str, groups: Sequence[ResolvedGroup]
) -> tuple[list[Pair], dict[str, str]]:
    """(pairs of the block `name`, reason by what was left out).

    Gated MLPs act(gate) * up let scales of `up` through; attention lets whatever all rows of v have
    in common through, for its probabilities add up to one.
    """
    config = _config(module)
    arch = None if config is None else table_entry(config)
    pairs, refused = [], {}
    for group in groups:
        if arch is None or config is None or group.kind == "other":
            refused[f"-> {'/'.join(group.layers)}"] = TRACED
            continue
        found = _pair(module, name, group, arch, config)
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            refused[f"-> {'/'.join(group.layers)}"] = found
        if group.kind == "attn_in":
            rotary = _rotary(module, name, group, arch, config)
            if isinstance(rotary, Pair):
                pairs.append(rotary)
            else:
                refused["q -> k"] = rotary
    return pairs, refused


def _pair(
    module: nn.Module, name: str, group: ResolvedGroup, arch: Arch, config: PreTrainedConfig
) -> Pair | str:
    """The pair of a group and its source, or why there is none."""
    if group.source is None:
        return {"mlp_in": ROUTED, "attn_out": FUSED, "mlp_out": BENT}.get(group.kind, TRACED)
    source = group.source.removeprefix(name + ".")
    readers = tuple(path.removeprefix(name + ".") for path in group.layers.values())
    made, linears = module.get_submodule(source), [module.get_submodule(path) for path in readers]
    width = made.get_parameter("weight").shape[0]
    biases = all("bias" in dict(x.named_parameters(recurse=False)) for x in (made, *linears))
    if group.kind in ("attn_in", "mlp_in"):
        return Pair("norm", source, readers, width, norm_shift=arch.norm_shift, shifts=biases)
    if group.kind == "mlp_out":  # a shift of `up` would come out times the gate
        return Pair("up-down", source, readers, width)
    inner = linears[0].get_parameter("weight").shape[1]
    heads = width * config.num_attention_heads // inner
    return Pair("v-o", source, readers, width, heads, inner // width, shifts=biases)


def _rotary(
    module: nn.Module, name: str, group: ResolvedGroup, arch: Arch, config: PreTrainedConfig
) -> Pair | str:
    """The pair of q and k, or why there is none."""
    if not {"q", "k"} <= group.layers.keys():
        return FUSED
    inside = module.get_submodule(arch.attention).modules()
    if any((w := x._parameters.get("weight")) is not None and w.dim() == 1 for x in inside):
        return NORMED
    q, k = (group.layers[role].removeprefix(name + ".") for role in ("q", "k"))
    queries, keys = (module.get_parameter(f"{path}.weight").shape[0] for path in (q, k))
    width = queries // config.num_attention_heads
    turned = rotary_pairs(config, width)
    heads = keys // width
    scales = heads * (int(turned.max()) + 1)
    return Pair("q-k", q, (k,), scales, heads, queries // keys, turned=turned)


def rotary_pairs(config: PreTrainedConfig, width: int) -> Tensor:
    """LongTensor [head_dim `width`]: number of the pair that a channel is rotated in.

    Only a scale that both channels of a pair share commutes with the rotation.
    """
    channels = torch.arange(width)
    rope = config.to_dict().get("rope_parameters")
    if not rope:
        return channels
    rotated = int(width * rope.get("partial_rotary_factor", 1.0))
    half = rotated // 2
    pairs = channels // 2 if config.model_type in INTERLEAVED else channels % half
    return torch.where(channels < rotated, pairs, channels - half)


def _config(module: nn.Module) -> PreTrainedConfig | None:
    """The config that some module of the block carries."""
    for child in module.modules():
        if isinstance(config := vars(child).get("config"), PreTrainedConfig):
            return config
    return None
