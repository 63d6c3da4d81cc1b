"""PackedLinear: sums of parts, names as stored, storage that kernels replace."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from aptq.core.plan import Plan, Target
from aptq.failures import Corrupt
from aptq.kernels.cpu import Int4
from aptq.kernels.reference import Reference
from aptq.runtime.linear import PackedLinear
from aptq.runtime.skeleton import pack_skeleton
from tests.kernels.samples import randn, sample
from tests.tiny import TINY


def test_a_sum_of_parts_with_bias() -> None:
    parts = [sample("int3-g7", 9, 21), sample("int2-row-z", 9, 21), sample("bf16", 9, 21)]
    bias = randn(9)
    layer = PackedLinear(parts, bias)
    weight = sum((part.dense() for part in parts[1:]), start=parts[0].dense())
    assert torch.equal(layer.dense(), weight)
    x = randn(2, 4, 21)
    assert torch.allclose(layer(x), F.linear(x, weight, bias), atol=1e-5)
    names = {"parts.0.codes", "parts.0.scale", "parts.1.codes", "parts.1.scale", "parts.1.zero"}
    assert layer.state_dict().keys() == {*names, "parts.2.weight", "bias"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_an_empty_layer_has_the_same_names_and_types() -> None:
    target = Target.parse("int3-g7+int2-row-z+bf16")
    full = PackedLinear([sample(str(part.grid), 9, 21) for part in target.parts])
    empty = PackedLinear.empty(target, (9, 21), None)

    def kinds(layer: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (t.dtype, t.shape) for name, t in layer.state_dict().items()}

    assert kinds(empty) == kinds(full)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


def test_prepare_replaces_the_storage() -> None:
    part = sample("int4-g64-z", 64, 128)
    layer = PackedLinear([part])
    x = randn(3, 128).bfloat16()
    before = layer(x)
    layer.prepare(torch.bfloat16)
    assert isinstance(layer.parts[0], Int4)
    held: list[Tensor] = list(layer.buffers())
    assert sum(tensor.nbytes for tensor in held) <= 1.12 * part.nbytes
    assert not {t.data_ptr() for t in held} & {t.data_ptr() for t in part.tensors().values()}
    assert not layer.state_dict()  # rearranged storage is never saved
    assert float((layer(x) - before).norm() / before.norm()) < 8e-3
    with pytest.raises(AssertionError, match="prepared already: Int4"):
        layer.prepare(torch.bfloat16)


def test_the_reference_keeps_the_storage() -> None:
    part = sample("int4-g64-z", 64, 128)
    layer = PackedLinear([part])
    layer.prepare(torch.bfloat16, "reference")
    kernel = layer.parts[0]
    assert isinstance(kernel, Reference)
    assert kernel.get_buffer("codes").data_ptr() == part.tensors()["codes"].data_ptr()


@pytest.mark.parametrize("name", ["model.layers.0.nothing", "model.layers.0.mlp"])
def test_a_plan_of_another_model_is_refused(name: str) -> None:
    config = TINY["llama"]()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Corrupt, match=rf"(?s)plan does not fit.*{name}.*linear layer expected"):
        pack_skeleton(skeleton, config, Plan({name: Target.parse("int4-row")}))
