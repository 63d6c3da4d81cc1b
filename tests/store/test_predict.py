"""Predicted bytes are the bytes of the files, to the byte, for every family and kind of target."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aptq.core.grid import Grid
from aptq.core.plan import Plan, Target
from aptq.model.model import Model
from aptq.store.headers import file_size, publish, spec_of, tensor_chunks
from aptq.store.predict import predict
from tests.kernels.samples import randn
from tests.store.packed import pack
from tests.tiny import TABLE, TRACED, tiny_model


@pytest.mark.parametrize("name", [*TABLE, *TRACED])
def test_every_file_has_the_predicted_size(name: str, tmp_path: Path) -> None:
    packed = pack(tiny_model(name, tmp_path, torch.bfloat16), tmp_path / "out", "mixed")
    predicted = predict(packed.model, packed.plan)
    real = {path.name: path.stat().st_size for path in packed.folder.iterdir()}
    assert predicted.files == real
    assert predicted.total == sum(real.values())
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "aptq.json"} < real.keys()
    assert predicted.linear_bytes == packed.plan.nbytes(packed.model.shapes, 2)
    assert predicted.bits == packed.plan.bits(packed.model.shapes, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_tensors_take_the_dtype_of_the_source(dtype: torch.dtype, tmp_path: Path) -> None:
    packed = pack(tiny_model("qwen2", tmp_path, dtype), tmp_path / "out", "mixed")
    real = {path.name: path.stat().st_size for path in packed.folder.iterdir()}
    assert predict(packed.model, packed.plan).files == real


def test_a_budget_sees_every_byte(tmp_path: Path) -> None:
    model = Model.open(tiny_model("llama", tmp_path, torch.bfloat16))
    totals = [
        predict(model, Plan.uniform(model.shapes, Grid.parse(text))).total
        for text in ("int2-row", "int3-row", "int4-row", "int4-g8-z", "int8-row", "bf16")
    ]
    assert totals == sorted(totals)


def test_a_plan_of_other_layers_is_refused(tmp_path: Path) -> None:
    model = Model.open(tiny_model("llama", tmp_path, torch.bfloat16))
    plan = Plan({**dict.fromkeys(model.shapes, Target()), "model.layers.9.o_proj": Target()})
    with pytest.raises(ValueError, match=r"(?s)model\.layers\.9\.o_proj.*did you mean"):
        predict(model, plan)


def test_files_are_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b.scale": randn(3, 5).half(),
        "a.codes": torch.arange(7, dtype=torch.uint8),
        "norm": randn(4),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "flag": torch.tensor([True, False]),
        "wide": randn(2).double(),
        "turned": randn(4, 6).bfloat16().T,
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    publish(ours, tensor_chunks(tensors))
    assert ours.stat().st_size == file_size({name: spec_of(t) for name, t in tensors.items()})
    tensors["turned"] = tensors["turned"].contiguous()
    save_file(tensors, theirs, metadata={"format": "pt"})
    assert ours.stat().st_size == theirs.stat().st_size
    loaded = load_file(ours)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
