"""compressed-tensors, "pack-quantized": weight_packed and its scales to the weight.

w = (u - 2^(bits-1)) * scale, or (u - z) * scale with zeros packed along the rows.  Releases of the
package before June 2026 packed 3, 5, 6 and 7 bits with gaps: such tensors are wider and refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from aptq.core.parts import Spec
from aptq.core.rounding import Scales
from aptq.core.words import unpack_words, words
from aptq.model.quantized.tensors import ADVICE, SCALES, decoded, misfit, specs
from aptq.model.sources import refuse


class Scheme(NamedTuple):
    """Weights of a config group; size 0: one scale a row; targets: names, regexes or classes."""

    bits: int
    size: int
    symmetric: bool
    targets: tuple[str, ...]


@dataclass(frozen=True)
class CompressedTensors:
    """The config groups of a folder."""

    leaves: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )
    optional: ClassVar[tuple[str, ...]] = ("weight_zero_point", "weight_g_idx")
    dropped: ClassVar[tuple[str, ...]] = ("input_scale", "k_scale", "v_scale")  # of activations
    schemes: tuple[Scheme, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> "CompressedTensors":
        """From quantization_config of the file `where`.  Raises ValueError for unknown forms."""
        for key in ("sparsity_config", "transform_config"):
            if config.get(key):
                refuse(f"compressed-tensors with {key} is not read", where, ADVICE)
        found = []
        for entry in dict(config.get("config_groups") or {}).values():
            args, form = entry.get("weights") or {}, entry.get("format") or config.get("format")
            bits, strategy, kind = args.get("num_bits"), args.get("strategy"), args.get("type")
            size = args.get("group_size") if strategy == "group" else 0
            known = form == "pack-quantized" and kind == "int" and bits in range(2, 9)
            if not known or type(size) is not int or (size < 1 and strategy != "channel"):
                shown = f"{where}: {form}, {kind} of {bits} bits by {strategy} of {size}"
                instead = "known are pack-quantized integers of 2 to 8 bits by group or channel"
                refuse("this form of compressed-tensors is not read", shown, instead)
            targets = tuple(map(str, entry.get("targets") or ()))
            found.append(
                Scheme(int(bits or 0), int(size or 0), bool(args.get("symmetric", True)), targets)
            )
        return cls(tuple(found))

    def weight(self, layer: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """As Method.weight.  weight_packed [out, words of in], zeros [words of out, groups]."""
        bits, rows, columns, group = self._scheme(layer, tensors)
        zero = tensors.get("weight_zero_point")
        if zero is not None:
            zero = unpack_words(zero.T.contiguous(), bits, rows).T
        codes = unpack_words(tensors["weight_packed"], bits, columns)
        index = tensors.get("weight_g_idx", torch.arange(columns) // group)
        return decoded(layer, codes, Scales(tensors["weight_scale"], zero), bits, index, dtype)

    def _scheme(self, layer: str, tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
        """Bits, rows, columns and group size: the first scheme that all tensors fit.

        A scheme that names the layer goes before those with patterns.
        """
        found, size = specs(tensors), tensors["weight_shape"].tolist()
        kind, integers = found["weight_scale"][0], (torch.int32, torch.int64)
        index = found.get("weight_g_idx", (torch.int32,))[0]
        named = [scheme for scheme in self.schemes if layer in scheme.targets]
        for bits, width, symmetric, _ in named or self.schemes:
            if found["weight_shape"][1] != (2,) or min(size) < 1 or kind not in SCALES:
                break
            rows, columns = map(int, size)
            group = width or columns
            groups = -(-columns // group)
            expected: dict[str, Spec] = {
                "weight_packed": (torch.int32, (rows, words(columns, bits))),
                "weight_scale": (kind, (rows, groups)),
                "weight_shape": (found["weight_shape"][0], (2,)),
                "weight_zero_point": (torch.int32, (words(rows, bits), groups)),
                "weight_g_idx": (index, (columns,)),
            }
            fits = found == {name: expected[name] for name in found} and index in integers
            if fits and symmetric != ("weight_zero_point" in found):
                return bits, rows, columns, group
        choices = " or ".join(f"{s.bits} bits, group {s.size}" for s in named or self.schemes)
        raise misfit(layer, tensors, choices or "any config group")
