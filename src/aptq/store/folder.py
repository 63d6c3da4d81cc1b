"""A checkpoint as a Hugging Face folder: tensors under transformers' own names, block by block.

What every export of this kind shares; how a quantized linear is stored is the exporter's.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from aptq.model.model import Model
from aptq.model.normalise import join_experts, join_rows
from aptq.store.checkpoint import Checkpoint
from aptq.store.headers import publish, tensor_chunks
from aptq.store.predict import INDEX


def contents(
    checkpoint: Checkpoint,
    model: Model,
    linears: Mapping[str, Sequence[str]],
    pack: Callable[[str, Sequence[str]], Mapping[str, Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Tensors of each block, then of the rest (model.blocks + 1 in all), by their names on disk.

    linears: quantized linear of transformers -> the layers of the plan that it holds;
    pack(linear, layers): its tensors by last name ("qweight").  Biases, kept layers and all else
    come from the checkpoint; what normalisation split or transposed is put together again.
    """
    inside = {layer for layers in linears.values() for layer in layers}
    targets = checkpoint.plan.targets
    for index, shard in enumerate(sorted(set(checkpoint.where.values()))):
        here = {
            name.partition(".parts.")[0] for name, at in checkpoint.where.items() if at == shard
        }
        tensors = {name: checkpoint.tensor(name) for name in here & checkpoint.where.keys()}
        for layer in (here & targets.keys()) - inside:  # 16 bits, but stored as a part
            tensors[f"{layer}.weight"] = checkpoint.dense(layer, model.dtype)
        _join(model, index, tensors)
        for path, layers in linears.items():
            if layers[0] in here:
                packed = pack(path, layers)
                tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in packed.items()}
        yield revert_weight_conversion(model.skeleton, tensors)


def write_folder(
    out: Path,
    shards: Iterable[Mapping[str, Tensor]],
    count: int,
    *,
    config: Mapping[str, object],
    files: Iterable[Path],
    texts: Mapping[str, str],
    report: Callable[[int, int], None],
) -> None:
    """Write `count` shards, their index, config.json, copies of `files`, and `texts` by name.

    One shard is in memory at a time; the folder is made, and config.json is written last.
    report: shards written, shards in all.
    """
    out.mkdir()
    where: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        publish(out / name, tensor_chunks(tensors))
        where |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        report(number, count)
    assert len(set(where.values())) == count, (len(set(where.values())), count)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    small = {**texts, INDEX: json.dumps(index, indent=2)}
    for path in files:
        publish(out / path.name, [path.read_bytes()])
    for name, text in (small | {"config.json": json.dumps(config, indent=2)}).items():
        publish(out / name, [f"{text}\n".encode()])


def _join(model: Model, index: int, tensors: dict[str, Tensor]) -> None:
    """Undo normalise() on the tensors of block `index`, by name and in place."""
    if index == model.blocks:
        return
    block = model.block_name(index)
    for path, roles in model.arch.joined.items():
        join_rows(tensors, f"{block}.{path}", roles)
    for path, module in model.skeleton.get_submodule(block).named_modules(prefix=block):
        if isinstance(module, Conv1D) and f"{path}.weight" in tensors:
            tensors[f"{path}.weight"] = tensors[f"{path}.weight"].T.contiguous()
        elif f"{path}.0.gate_proj.weight" in tensors:
            join_experts(tensors, path, len(module.get_parameter("down_proj")))
