"""From a config.json to an empty model, without trusting what the file says."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from aptq.core.reading import read_json

# No model of transformers has so many; an empty block or expert costs time and memory all the same.
_BLOCKS, _EXPERTS = 4096, 1 << 16


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, where: Path | str = "config.json"
) -> PreTrainedModel:
    """The whole module tree of `config` with parameters on meta and real buffers.

    `where` names its file in the ValueError for values that no model of the family can have.
    """
    with described(where), no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()  # skipped together with the initialisation
    return model.eval().requires_grad_(False)


def safe_config(folder: Path) -> PreTrainedConfig:
    """config.json as transformers reads it, without what could make it run or fetch other code.

    A file may name a kernel of the hub as the implementation of its attention or experts, which
    transformers would download and import: such wishes are dropped.  Raises ValueError for values
    that do not describe a model.
    """
    path = folder / "config.json"
    with described(path):
        _check_sizes(read_json(path))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert isinstance(config, PreTrainedConfig)
    config._attn_implementation = config._experts_implementation = None
    return config


@contextmanager
def described(path: Path | str) -> Iterator[None]:
    """Whatever a family raises on values that it never expected becomes one error."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ValueError(
            f"config.json does not describe a model\n{path}: {reason}\n"
            "use the config.json that belongs to these weights"
        ) from error


def _check_sizes(raw: Any) -> None:
    """Raise ValueError, one line, for numbers that would take hours to build an empty model of."""
    for key, value in raw.items():
        if isinstance(value, dict):
            _check_sizes(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = _BLOCKS if "layer" in key and "num" in key else math.inf
            most = _BLOCKS if key == "n_layer" else _EXPERTS if "expert" in key else most
            if not -math.inf < value < min(most + 1, 1 << 53):
                raise ValueError(f"{key} = {value}")
