"""The transformers quantizer "aptq": AutoModelForCausalLM.from_pretrained on a packed checkpoint.

Everything it needs is in config.json and the safetensors files, so a hub id works too.  What is
heavy is imported inside: this file is loaded while transformers itself is half loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

METHOD = "aptq"


class AptqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """quantization_config of config.json: version and plan; `kernel` may be added when loading."""

    def __init__(self, version: int, plan: dict[str, Any], kernel: str = "auto") -> None:
        self.quant_method = METHOD
        self.version, self.plan, self.kernel = version, plan, kernel

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # the interface of transformers
    ) -> Any:
        """Checked and closed.  Raises ValueError for a newer version and for unknown keys."""
        from aptq.store.manifest import check_version, closed, corrupt

        where, data = "config.json: quantization_config", dict(config_dict)
        kernel = data.pop("kernel", "auto")
        check_version(where, data.get("quant_method"), data.get("version"))
        closed(where, data, {"quant_method": str, "version": int, "plan": dict})
        if kernel not in ("auto", "reference"):
            corrupt("unknown kernel", f"{where}: {kernel!r}", "use auto or reference")
        config = cls(data["version"], data["plan"], kernel)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"quant_method": METHOD, "version": self.version, "plan": self.plan}


class AptqQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules into the skeleton, and lets kernels take over the loaded storage."""

    requires_calibration = True

    def __init__(self, quantization_config: AptqConfig, pre_quantized: bool = True) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self.config = quantization_config

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """None: the checkpoint's names are those of the normalised modules."""
        return []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: object
    ) -> None:
        from aptq.runtime.skeleton import pack_skeleton
        from aptq.store.headers import check_headers
        from aptq.store.manifest import read_plan

        plan = read_plan("config.json: quantization_config", self.config.plan)
        pack_skeleton(model, model.config.get_text_config(decoder=True), plan)
        check_headers(checkpoint_files or [], model.state_dict(), set(model.all_tied_weights_keys))
        for module in model.modules():
            # All else is in the files: transformers shall not reach for weights that are packed.
            if not module._non_persistent_buffers_set:
                module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        from aptq.runtime.skeleton import prepare_model

        if any(tensor.is_meta for tensor in model.state_dict().values()):
            raise ValueError(
                "a packed model cannot be offloaded\nsome of its tensors were left on the disk\n"
                "choose a device_map without cpu or disk beside a GPU, or a smaller checkpoint"
            )
        model.requires_grad_(False)
        if self.config.kernel == "auto":
            prepare_model(model, model.dtype, "auto")
            _release_files(model)

    def is_serializable(self) -> bool:
        """Only where no kernel has rearranged the storage; else copy the folder."""
        return self.config.kernel == "reference"

    @property
    def is_trainable(self) -> bool:
        """No gradients for packed weights."""
        return False


def _release_files(model: torch.nn.Module) -> None:
    """Copy what still lies in memory-mapped files.

    One norm that stays mapped keeps the whole shard mapped, and the pages of codes that kernels
    have copied would count as resident twice.  Tensors are replaced, not refilled: a view of a
    mapped tensor refers to it whatever its data.
    """
    from torch import nn

    from aptq.kernels.reference import Kernel, Reference

    copies: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        if isinstance(module, Kernel) and not isinstance(module, Reference):
            continue  # has copied already
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "cpu":
                fresh = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module._parameters[name] = copies.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "cpu":
                module._buffers[name] = buffer.clone()


def register() -> None:
    """Make transformers know the quantizer; more than once does no harm."""
    from transformers.quantizers import auto

    known: Mapping[str, object] = auto.AUTO_QUANTIZER_MAPPING
    if METHOD not in known:
        auto.register_quantization_config(METHOD)(AptqConfig)
        auto.register_quantizer(METHOD)(AptqQuantizer)
