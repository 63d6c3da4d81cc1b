"""GPTQ, versions 1 and 2: qweight, qzeros, scales and g_idx of a linear to its weight.

w[o, i] = scales[g_idx[i], o] * (u[i, o] - z[g_idx[i], o]); version 1 stores z - 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aptq.core.parts import Spec
from aptq.core.rounding import Scales
from aptq.core.words import unpack_words, words
from aptq.model.quantized.tensors import ADVICE, SCALES, decoded, misfit, specs
from aptq.model.sources import refuse

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GPTQ:
    """schemes: (bits, group size) of config.json and of its `dynamic` rules; a row's is -1."""

    leaves: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)
    dropped: ClassVar[tuple[str, ...]] = ()
    version: int
    schemes: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> "GPTQ":
        """From quantization_config of the file `where`.  Raises ValueError for unknown forms."""
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        words_of = config.get("pack_dtype") or "int32"
        if form not in ("gptq", "gptq_v2") or words_of != "int32":
            instead = "known are gptq and gptq_v2 in int32"
            refuse("this form of GPTQ is not read", f"{where}: {form} in {words_of}", instead)
        rules = config.get("dynamic") or {}
        found = [config, *({**config, **rule} for rule in dict(rules).values() if rule)]
        for one in found:
            bits, group = one.get("bits"), one.get("group_size")
            if bits not in BITS or type(group) is not int or (group < 1 and group != -1):
                shown = f"{where}: bits {bits!r}, group_size {group!r}"
                refuse("unknown bits or groups in GPTQ", shown, f"known are {BITS} bits")
        schemes = dict.fromkeys((int(one["bits"]), one["group_size"]) for one in found)
        return cls(2 if form == "gptq_v2" else 1, tuple(schemes))

    def weight(self, layer: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """As Method.weight.  qweight [words of in, out], qzeros [groups, words of out]."""
        bits, columns, group = self._scheme(layer, tensors)
        zero = unpack_words(tensors["qzeros"], bits, tensors["scales"].shape[1])
        if self.version == 1:
            if int(zero.max()) == 2**bits - 1:
                shown = f"{layer}: {int((zero == 2**bits - 1).sum())} of {zero.numel()} zeros"
                refuse("zeros overflow in version 1, where readers disagree", shown, ADVICE)
            zero += 1
        codes = unpack_words(tensors["qweight"].T.contiguous(), bits, columns)
        index = tensors.get("g_idx", torch.arange(columns) // group)
        return decoded(layer, codes, Scales(tensors["scales"].T, zero.T), bits, index, dtype)

    def _scheme(self, layer: str, tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Bits, columns and group size: the first scheme that all tensors fit."""
        found = specs(tensors)
        kind, shape = found["scales"]
        for bits, size in self.schemes:
            if kind not in SCALES or not all(len(shape) for _, shape in found.values()):
                break
            columns = len(tensors.get("g_idx", ())) or len(tensors["qweight"]) * 32 // bits
            group, rows = columns if size == -1 else size, shape[-1]
            groups = -(-columns // group)
            expected: dict[str, Spec] = {
                "qweight": (torch.int32, (words(columns, bits), rows)),
                "qzeros": (torch.int32, (groups, words(rows, bits))),
                "scales": (kind, (groups, rows)),
                "g_idx": (torch.int32, (columns,)),
            }
            if columns and found == {name: expected[name] for name in found}:
                return bits, columns, group
        choices = " or ".join(f"{bits} bits in groups of {size}" for bits, size in self.schemes)
        raise misfit(layer, tensors, choices)
