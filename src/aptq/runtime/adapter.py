"""Adapters: factors beside the codes of a loaded model, put on and taken off without a new load.

A folder with adapter.json (what it belongs to) and adapter.safetensors (left and right factor of
every layer, as core.lowrank stores them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from aptq.core.parts import Part, load_part
from aptq.core.plan import PartSpec
from aptq.kernels.dispatch import Choice, prepare
from aptq.runtime.linear import PackedLinear

NOTE, TENSORS, VERSION = "adapter.json", "adapter.safetensors", 1
LIMIT = 1 << 20  # bytes of adapter.json that are read


def attach(
    model: PreTrainedModel, folder: str | Path, checkpoint: str, *, kernel: Choice = "auto"
) -> PreTrainedModel:
    """Put on the adapter in `folder` in place of any other; `checkpoint` tells what it must fit.

    checkpoint: SHA-256 of the checkpoint's aptq.json.  Raises ValueError for an adapter of another
    one, or one that is damaged; the model is unchanged then.
    """
    path, known = Path(folder), dict(model.named_modules())
    specs, linears = read_note(path, checkpoint), dict[str, PackedLinear]()
    for layer in specs:
        module = known.get(layer)
        if not isinstance(module, PackedLinear):
            _refuse(path, f"{layer} is no compressed layer of this model")
        linears[layer] = module
    found: dict[str, Part] = {}
    try:
        with safe_open(path / TENSORS, framework="pt", device="cpu") as file:
            for layer, spec in specs.items():
                shape = (linears[layer].out_features, linears[layer].in_features)
                place = next(linears[layer].buffers()).device

                def read(name: str, layer: str = layer, place: torch.device = place) -> Tensor:
                    tensor: Tensor = file.get_tensor(f"{layer}.{name}")
                    return tensor.to(place)

                found[layer] = load_part(spec, shape, read)
    except (OSError, ValueError, SafetensorError) as error:
        _refuse(path, " ".join(str(error).split()))
    detach(model)
    for layer, part in found.items():
        linears[layer].parts.append(prepare(part, model.dtype, kernel))
        linears[layer].adapted = True
    return model


def detach(model: nn.Module) -> None:
    """Take off what `attach` has put on."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.adapted:
            module.parts = module.parts[:-1]
            module.adapted = False


def read_note(path: Path, checkpoint: str) -> dict[str, PartSpec]:
    """What the factors of every layer are.  Raises ValueError where it is not for `checkpoint`."""
    try:
        with (path / NOTE).open("rb") as file:
            data = json.loads(file.read(LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        _refuse(path, f"{NOTE}: {error}")
    if not isinstance(data, dict) or data.keys() != {"version", "checkpoint", "layers"}:
        _refuse(path, f"{NOTE} has other keys than version, checkpoint, layers")
    if data["version"] != VERSION:
        _refuse(path, f"version {data['version']!r}, this program reads {VERSION}")
    if data["checkpoint"] != checkpoint:
        _refuse(path, f"it was made for checkpoint {str(data['checkpoint'])[:16]}, not for this")
    layers = data["layers"]
    if not isinstance(layers, dict) or not all(isinstance(x, str) for x in layers.values()):
        _refuse(path, "layers must map names to texts such as r32")
    specs = {name: PartSpec.parse(text) for name, text in layers.items()}
    odd = [name for name, spec in specs.items() if spec.kind != "lowrank"]
    if odd:
        _refuse(path, f"{odd[0]} has {specs[odd[0]]}, which are no factors")
    return specs


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(
        f"the adapter cannot be used\n{path}: {why}\nmake one for this run with `aptq adapt`"
    )
