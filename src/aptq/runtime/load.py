"""Load a packed checkpoint as a transformers model, packed or decoded to an ordinary one."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from aptq.kernels.dispatch import Choice
from aptq.model.normalise import Experts, Joined, join_experts, join_rows
from aptq.model.skeleton import build_skeleton, safe_config
from aptq.runtime.adapter import attach
from aptq.runtime.hf import register
from aptq.runtime.linear import Packed
from aptq.store.checkpoint import Checkpoint
from aptq.store.headers import hash_file
from aptq.store.manifest import NAME


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    kernel: Choice = "auto",
    adapter: str | Path | None = None,
) -> PreTrainedModel:
    """The model of a run or checkpoint folder, in eval mode, with packed weights in memory.

    `dtype` is that of activations and of what was kept (None: the checkpoint's).  "auto" lets the
    fastest kernels take over the storage, "reference" decodes exactly what is stored.  `adapter`
    is a folder of `aptq.adapt` for this checkpoint.  Raises ValueError where there is no
    checkpoint, Corrupt for one that is damaged.
    """
    register()
    checkpoint = Checkpoint.open(folder)
    config = safe_config(checkpoint.folder)
    config.quantization_config = {**config.quantization_config, "kernel": kernel}
    on = torch.device(device)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map=None if on.type == "cpu" else {"": on},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    assert isinstance(model, PreTrainedModel), type(model)
    if adapter is None:
        return model
    return attach(model, adapter, hash_file(checkpoint.folder / NAME), kernel=kernel)


def dense(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The same model decoded: an ordinary transformers model on the CPU, as large as the original.

    Its modules and names are those of the original, so it can be saved and converted.
    """
    packed = load(folder, dtype=dtype, kernel="reference")
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    model = build_skeleton(config, packed.dtype)
    state = _decoded(packed)
    _fuse(state, packed)
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            state[f"{path}.weight"] = state[f"{path}.weight"].T.contiguous()
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _decoded(packed: nn.Module) -> dict[str, Tensor]:
    """State dict of the normalised model with weights in place of parts."""
    state = {name: t for name, t in packed.state_dict().items() if ".parts." not in name}
    dtype = next(packed.parameters()).dtype
    for path, module in packed.named_modules():
        if isinstance(module, Packed):
            state[f"{path}.weight"] = module.dense(dtype)
    return state


def _fuse(state: dict[str, Tensor], packed: nn.Module) -> None:
    """Undo normalisation: put joined linears and experts together again under their old names."""
    for path, module in packed.named_modules():
        roles = [name for name, _ in module.named_children()]
        if isinstance(module, Joined):
            join_rows(state, path, roles)
        elif isinstance(module, Experts):
            join_experts(state, path, module.num_experts)
