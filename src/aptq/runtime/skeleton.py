"""Empty packed modules for a model on meta: what a checkpoint is loaded into."""

from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from aptq.core.plan import Plan
from aptq.failures import Corrupt
from aptq.kernels.dispatch import Choice
from aptq.model.normalise import normalise_model
from aptq.model.outer import embedding_scale, is_tied
from aptq.runtime.embedding import PackedEmbedding, TiedHead
from aptq.runtime.linear import PackedLinear, empty_parts


def pack_skeleton(skeleton: PreTrainedModel, config: PreTrainedConfig, plan: Plan) -> None:
    """Normalise a skeleton on meta and put an empty packed module for every layer of the plan.

    A head that is tied to a planned embedding becomes a TiedHead.  Raises Corrupt if the plan names
    what is neither a linear layer of the model nor its token embedding.
    """
    normalise_model(skeleton, config)
    modules, ties = dict(skeleton.named_modules()), dict(skeleton.all_tied_weights_keys)
    for name, target in plan.targets.items():
        module = modules.get(name)
        scale = embedding_scale(module) if module is skeleton.get_input_embeddings() else None
        linear = isinstance(module, nn.Linear) and f"{name}.weight" not in ties
        if not linear and scale is None:
            _misfit(name, module, config)
        if target.kept:
            continue
        parts = empty_parts(target, tuple(module.weight.shape))
        if linear:
            skeleton.set_submodule(name, PackedLinear(parts, module.bias))
        else:
            packed = PackedEmbedding(parts, module.weight.dtype, scale)
            _put_embedding(skeleton, name, packed)


def _put_embedding(skeleton: PreTrainedModel, name: str, packed: PackedEmbedding) -> None:
    head = skeleton.get_output_embeddings()
    path = next((path for path, other in skeleton.named_modules() if other is head), "")
    if is_tied(skeleton.all_tied_weights_keys, name, path):
        del skeleton.all_tied_weights_keys[f"{path}.weight"]  # there is no such tensor any more
        skeleton.set_submodule(path, TiedHead(packed, head.bias))
    skeleton.set_submodule(name, packed)


def prepare_model(model: nn.Module, dtype: torch.dtype, choice: Choice) -> None:
    """Let kernels take over the storage of every packed linear layer, one by one."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.prepare(dtype, choice)


def _misfit(name: str, module: nn.Module | None, config: PreTrainedConfig) -> NoReturn:
    found = "nothing" if module is None else type(module).__name__
    raise Corrupt(
        f"the plan does not fit the model\n{name}: {found}, a linear layer expected "
        f"in {config.model_type}\nuse the config.json that belongs to the checkpoint"
    )
