"""What opening a checkpoint does not tell: are all bytes as listed, all values possible, and is
every parameter of the model there?
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aptq.core.plan import Target
from aptq.model.skeleton import build_skeleton, safe_config
from aptq.store.checkpoint import Checkpoint
from aptq.store.manifest import corrupt


class Account(NamedTuple):
    """Parameters of the model by what became of them; tied ones count once."""

    compressed: int  # in layers that have parts
    kept: int  # in layers that the plan leaves as they are
    skipped: int  # in norms, biases and all else that no plan speaks of

    @property
    def total(self) -> int:
        """All of them."""
        return self.compressed + self.kept + self.skipped


class Verified(NamedTuple):
    """What was found sound."""

    files: int
    tensors: int
    nonfinite: dict[str, int]  # kept tensors with NaN or Inf, as the source has them -> how many


def account(checkpoint: Checkpoint) -> Account:
    """Where the parameters are.  Raises Corrupt unless they are exactly those of the model.

    The number to compare with is that of transformers' own model, from config.json alone.
    """
    manifest = checkpoint.manifest
    config = safe_config(checkpoint.folder)
    del config.quantization_config
    config.tie_word_embeddings = manifest.tied
    skeleton = build_skeleton(config, torch.bfloat16)
    buffers = {name for name, _ in skeleton.named_buffers()}
    planned = {f"{name}.weight" for name in manifest.plan.targets}
    rest = checkpoint.specs.keys() - planned - buffers
    sizes = {True: 0, False: 0}
    for name, target in manifest.plan.targets.items():
        sizes[target.kept] += math.prod(manifest.shapes[name])
    skipped = sum(math.prod(checkpoint.specs[n][1]) for n in rest if ".parts." not in n)
    found = Account(sizes[False], sizes[True], skipped)
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if found.total != wanted:
        where = f"{checkpoint.folder}: {found.total:,} stored, {wanted:,} in {config.model_type}"
        corrupt("parameters of the model are missing or too many", where)
    return found


def verify(checkpoint: Checkpoint) -> Verified:
    """Read everything: hashes, the parameters' number, and every layer decoded.  Raises Corrupt."""
    checkpoint.verify()
    account(checkpoint)
    bad: dict[str, int] = {}
    for name in checkpoint.specs:
        tensor = checkpoint.tensor(name)
        if count := _nonfinite(tensor):
            if ".parts." in name:
                where = f"{checkpoint.folder}: {name}: {count:,} of {tensor.numel():,} values"
                corrupt("stored scales or values are not finite", where)
            bad[name] = count
    for name, target in checkpoint.plan.targets.items():
        _decode(checkpoint, name, target)
    return Verified(len(checkpoint.manifest.files), len(checkpoint.specs), bad)


def _decode(checkpoint: Checkpoint, name: str, target: Target) -> None:
    """Raise Corrupt where codes or places are out of range, or stand for no finite weight."""
    if target.kept:
        return
    try:
        weight = checkpoint.dense(name)
    except (IndexError, ValueError, RuntimeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        corrupt("a stored layer cannot be decoded", f"{checkpoint.folder}: {name}: {reason}")
    if count := _nonfinite(weight):
        where = f"{checkpoint.folder}: {name}: {count:,} of {weight.numel():,} weights"
        corrupt("a stored layer does not decode to finite weights", where)


def _nonfinite(tensor: Tensor) -> int:
    """Values that are NaN or Inf."""
    return int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
