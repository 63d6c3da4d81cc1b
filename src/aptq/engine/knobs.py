"""Knobs: what gradients may change in one block, as tensors that stand in for its parameters.

A stage builds them; `tune` trains them; `settle` puts the result into layers and module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aptq.core.parts import Part, Quantized
from aptq.core.soft import cast_ste
from aptq.engine.block import Block
from aptq.engine.layer import Layer


class Knob(nn.Module, ABC):
    """One layer's weight as a function of parameters.

    Its state_dict decides the result: what changes beside parameters belongs into buffers.
    """

    steady: bool = False  # weight() does the same at every step, whatever Python holds

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight [out, in] float32 that is trained, differentiable; may be soft."""

    @abstractmethod
    def part(self) -> Part:
        """What is stored: the weight as it will be, made hard."""

    def parts(self) -> list[Part]:
        """All parts of the layer."""
        return [self.part()]

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """torch parameter groups with their rates."""

    def begin(self, turn: int, turns: int) -> None:
        """A turn of the loop begins."""

    def stepped(self) -> None:
        """A step was taken."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss as a share of it, if anything: no unit to guess."""
        return None


class Knobs(nn.Module):
    """Knobs of a block's layers, and its norms where they are trained."""

    def __init__(
        self, block: Block, knobs: Mapping[str, Knob], norms: float = 0.0, *, biases: bool = False
    ) -> None:
        """knobs: by full name of the layer; norms: rate of the norm weights, 0 = as they are.

        biases: those of the linears are trained at the same rate.
        """
        super().__init__()
        self.block, self.norm_rate = block, norms
        self.names = list(knobs)
        self.knobs = nn.ModuleList(knobs.values())
        found = vectors(block.module, biases=biases) if norms else {}
        self.norm_names = list(found)
        self.norms = nn.ParameterList(found.values())

    @property
    def steady(self) -> bool:
        """Do all knobs do the same at every step?"""
        return all(knob.steady for knob in self._knobs())

    def groups(self) -> list[dict[str, Any]]:
        """torch parameter groups with their rates."""
        found = [group for knob in self._knobs() for group in knob.groups()]
        if self.norm_names:
            found.append({"params": list(self.norms), "lr": self.norm_rate})
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Names in block.module -> values in its dtypes; what will be stored in eval mode."""
        known = dict(self.block.module.named_parameters())
        return {name: x.to(known[name].dtype) for name, x in self.values().items()}

    def values(self) -> dict[str, Tensor]:
        """The same in float32."""
        skip = len(self.block.name) + 1
        found = {
            f"{name[skip:]}.weight": knob.weight() if self.training else _dense(knob.parts())
            for name, knob in zip(self.names, self._knobs(), strict=True)
        }
        return {**found, **self.norm_values()}

    def norm_values(self) -> dict[str, Tensor]:
        """Norm weights as the model's dtype holds them, in float32; differentiable."""
        known = dict(self.block.module.named_parameters())
        pairs = zip(self.norm_names, self.norms, strict=True)
        return {name: cast_ste(value, known[name].dtype) for name, value in pairs}

    def begin(self, turn: int, turns: int) -> None:
        """A turn of the loop begins."""
        for knob in self._knobs():
            knob.begin(turn, turns)

    def stepped(self) -> None:
        """A step was taken."""
        for knob in self._knobs():
            knob.stepped()

    def penalty(self) -> Tensor | None:
        """Sum of what the knobs add to the loss."""
        found = [value for knob in self._knobs() if (value := knob.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    @torch.no_grad()
    def settle(self) -> None:
        """Parts into the layers, values into the module; new tensors, for the old may be shared."""
        for name, knob in zip(self.names, self._knobs(), strict=True):
            self.block.layers[name].parts = knob.parts()
        for group in self.block.groups:
            self.block.commit(group)
        for name, value in self.norm_values().items():
            parameter = self.block.module.get_parameter(name)
            parameter.data = value.to(parameter.dtype)

    def _knobs(self) -> list[Knob]:
        return list(self.knobs)  # type: ignore[arg-type]


def _dense(parts: Sequence[Part]) -> Tensor:
    """The sum of the parts [out, in] float32."""
    first, *others = (part.dense() for part in parts)
    return sum(others, start=first)


def vectors(module: nn.Module, *, biases: bool = False) -> dict[str, nn.Parameter]:
    """Trainable float32 copies of the weights and biases of a block's norms, by name.

    A norm is what holds a vector `weight`.  biases: also those of the linears.
    """
    found = {}
    for path, child in module.named_modules():
        weight = child._parameters.get("weight")
        norm = weight is not None and weight.dim() == 1
        for name, value in child.named_parameters(path, recurse=False):
            if norm or (biases and isinstance(child, nn.Linear) and value.dim() == 1):
                found[name] = nn.Parameter(value.detach().float().clone())
    return found


def tunable_layers(block: Block) -> dict[str, Layer]:
    """Layers by name that a knob may open: on an integer grid, not kept and not 16-bit.

    GGUF's own types stay as they are: whole numbers scale them, or their levels are a table.
    """
    found = {x.name: x for group in block.groups for x in block.open_layers(group)}
    return {n: x for n, x in found.items() if x.target.grid is None or not x.target.grid.special}


def part_in(layer: Layer) -> Quantized | None:
    """The codes of a layer that was quantized before, as it is alone; None if it has none.

    Raises ValueError where they are of several widths.
    """
    if not layer.parts:
        return None
    (part,) = layer.parts
    if not isinstance(part, Quantized):
        raise ValueError(
            f"a reconstruction cannot open {layer.name}\n"
            f"its codes are {type(part).__name__}, Quantized expected: one width for all groups\n"
            "give it a grid without '~', or leave the stage out"
        )
    return part
