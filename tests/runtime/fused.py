"""A small Llama whose linears lie as the GPU kernels want them, on any device."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from aptq.core.grid import Grid
from aptq.core.parts import nearest_part
from aptq.kernels.triton.layer import Fused
from aptq.runtime.graph import Static
from aptq.runtime.linear import PackedLinear

COUPLED = {"q": "int4-g64-z", "k": "int4-g64-z", "v": "int4-g64-z", "o": "int3-g128"}
COUPLED |= {"gate": "int3-g128", "up": "int3-g128", "down": "int4-g64-z"}
MIXED = {**COUPLED, "v": "int3-g128", "up": "int4-g64-z"}


def pack(linear: nn.Linear, grid: str) -> PackedLinear:
    part = nearest_part(linear.weight.float(), Grid.parse(grid))
    packed = PackedLinear([part], linear.bias)
    packed.parts[0] = Fused.prepare(part, torch.bfloat16)
    return packed


def fused_model(grids: dict[str, str], device: str = "cpu", **changes: object) -> PreTrainedModel:
    """bfloat16; `grids` by the first word of a linear's name; changes: of the config."""
    sizes = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **changes})
    model = LlamaForCausalLM(config).eval()
    for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
        nn.init.normal_(bias)
    model = model.requires_grad_(False).to(device, torch.bfloat16)
    for path, linear in [*model.model.named_modules()]:
        if isinstance(linear, nn.Linear):
            model.set_submodule(
                f"model.{path}", pack(linear, grids[path.rpartition(".")[2].split("_")[0]])
            )
    return model


def same_steps(exact_steps: Static, steps: Static, ids: Tensor, count: int = 24) -> None:
    """Logits of both agree as far as bfloat16 allows, and tokens wherever they are clear."""
    step = ids
    for _ in range(count):
        exact, found = exact_steps(step).clone(), steps(step).clone()
        # bfloat16 through two blocks of large weights: up to 0.2 of the logits' deviation
        torch.testing.assert_close(found, exact, atol=0.4 * float(exact.std()), rtol=0.05)
        best = exact.topk(2, -1).values.float()
        clear = best[:, 0] - best[:, 1] > 0.8 * exact.float().std()
        assert torch.equal(found.argmax(-1)[clear], exact.argmax(-1)[clear])
        step = exact.argmax(-1, keepdim=True)
