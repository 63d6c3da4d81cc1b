"""Finished: the layers of all candidates as a walk with all stages leaves them, kept in files.

One file a candidate and block holds the parts, exact and as small as a checkpoint; whoever made
the files removes them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from aptq.core.plan import Target
from aptq.engine.block import Block
from aptq.engine.layer import Layer
from aptq.store.checkpoint import layer_parts
from aptq.store.headers import publish, tensor_chunks


@dataclass(frozen=True)
class Finished:
    """Files in `folder`; `where`: that of each layer, by its name and target."""

    folder: Path
    where: dict[tuple[str, Target], Path] = field(default_factory=dict)

    def keep(self, block: Block) -> None:
        """Write the layers of a finished block, still loaded."""
        layers = {(x.name, x.target): x for g in block.groups for x in block.open_layers(g)}
        if not layers:
            return
        file = self.folder / f"finished-{len({*self.where.values()}):05}.safetensors"
        self.where.update(dict.fromkeys(layers, file))
        tensors = {
            f"{name}.parts.{number}.{key}": value
            for (name, _), layer in layers.items()
            for number, part in enumerate(layer.parts)
            for key, value in part.tensors().items()
        }
        publish(file, tensor_chunks(tensors))

    def dense(self, layer: Layer, target: Target) -> Tensor:
        """What became of a layer at a target, float32 [out, in] on the device of its weight."""
        out, columns = layer.weight.shape
        with safe_open(self.where[layer.name, target], framework="pt", device="cpu") as file:

            def read(name: str) -> Tensor:
                found: Tensor = file.get_tensor(name)
                return found.to(layer.weight.device)

            parts = layer_parts(layer.name, target, (out, columns), read)
            first, *others = (part.dense() for part in parts)
        return sum(others, start=first)

    def close(self) -> None:
        """Remove the files."""
        for file in {*self.where.values()}:
            file.unlink(missing_ok=True)
        self.where.clear()
