"""On a CUDA device: the whole way from weights to generated logits, against the same on the CPU."""

from pathlib import Path

import pytest
import torch

from aptq.core.grid import Grid
from aptq.engine.data import Data
from aptq.engine.stage import methods
from aptq.pipeline import compress
from aptq.recipe import Recipe
from aptq.runtime.load import dense, load
from tests.engine.run import windows
from tests.tiny import tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
def test_compress_and_run(arch: str, method: str, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"word {i} and {i * i}" for i in range(200)), "utf-8")
    recipe = Recipe(
        stages=(methods.get(method)(),),
        grids=(Grid.parse("int4-g16-z"),),
        budget="",
        data=Data(source=str(text), samples=3, length=16),
    )
    folder = tiny_model(arch, tmp_path / "model", torch.bfloat16)
    compress(folder, tmp_path / "run", recipe=recipe, device="cuda")
    compress(folder, tmp_path / "again", recipe=recipe, device="cuda")
    shards = sorted((tmp_path / "run" / "checkpoint").glob("*.safetensors"))
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "again" / "checkpoint" / shard.name).read_bytes()
    ids = windows(2, 20)
    packed = load(tmp_path / "run", device="cuda", dtype=torch.float32)
    with torch.no_grad():
        one = packed(ids.cuda()).logits.cpu()
        two = dense(tmp_path / "run", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
