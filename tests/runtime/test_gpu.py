"""Packed models on a GPU: weights stay packed there and compute what the CPU computes."""

from pathlib import Path

import pytest
import torch

from aptq.kernels.dispatch import prepare
from aptq.kernels.reference import Tiled
from aptq.runtime.load import load
from tests.kernels.samples import randn, sample
from tests.store.packed import pack
from tests.tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("text", ["int4-g64-z", "int3-g7-fz", "int8-row", "int2-g16-z-bf16"])
def test_tiles(text: str) -> None:
    kernel = prepare(sample(text, 48, 128), torch.float32)
    x = randn(5, 128)
    wanted = kernel(x)
    moved = kernel.cuda()
    assert isinstance(moved, Tiled)
    assert torch.allclose(moved(x.cuda()).cpu(), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_model(name: str, tmp_path: Path) -> None:
    folder = pack(tiny_model(name, tmp_path), tmp_path / "out", "mixed").folder
    on_gpu = load(folder, device="cuda")
    assert all(tensor.is_cuda for tensor in on_gpu.state_dict().values())
    with torch.no_grad():
        wanted = load(folder)(tiny_tokens()).logits
        found = on_gpu(tiny_tokens().cuda()).logits.cpu()
    assert torch.allclose(found, wanted, atol=1e-3)
