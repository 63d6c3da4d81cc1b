"""Parts: bytes are what the grid says, every row range decodes alone, bad tensors are refused."""

import pytest
import torch
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import PARTS, Dense, Part, Quantized, part_of, part_specs
from aptq.core.plan import PartSpec
from aptq.core.rounding import encode, fit, snap

TEXTS = ["int2-g7-z", "int3-row-z", "int3-g5", "int4-g8-z", "int5-g6-z-bf16", "int8-g5-fz", "bf16"]
SHAPE = (9, 21)


def part_and_values(text: str) -> tuple[Part, Tensor]:
    grid = Grid.parse(text)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    scales = fit(weight, grid)
    snapped = snap(weight, scales, grid)
    return part_of(snapped, scales, grid), snapped


@pytest.mark.parametrize("text", TEXTS)
def test_holds_the_values_in_exactly_the_bytes_of_the_grid(text: str) -> None:
    part, values = part_and_values(text)
    grid = Grid.parse(text)
    assert part.shape == SHAPE
    assert torch.equal(part.dense(), values)
    assert torch.equal(part.dense(torch.bfloat16), values.bfloat16())
    assert part.nbytes == grid.nbytes(SHAPE)
    assert part.nbytes == sum(tensor.nbytes for tensor in part.tensors().values())
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in part.tensors().items()}
    assert specs == part_specs(PartSpec(grid), SHAPE)
    assert all(tensor.is_contiguous() for tensor in part.tensors().values())


@pytest.mark.parametrize("text", TEXTS)
def test_rows_are_those_of_the_whole(text: str) -> None:
    part, values = part_and_values(text)
    for start in range(9):
        for stop in range(start + 1, 10):
            assert torch.equal(part.rows(start, stop), values[start:stop])


@pytest.mark.parametrize("text", TEXTS)
def test_load_inverts_tensors_and_meta(text: str) -> None:
    part, values = part_and_values(text)
    kind = PARTS[part.meta()["type"]]
    loaded = kind.load(part.tensors(), part.meta(), SHAPE)
    assert torch.equal(loaded.dense(), values)
    assert loaded.meta() == part.meta()


def test_make_packs_codes() -> None:
    grid = Grid("int3", 5, "int")
    weight = torch.randn(SHAPE)
    scales = fit(weight, grid)
    codes = encode(weight, scales, grid)
    part = Quantized.make(codes, scales, grid)
    assert torch.equal(part.unpacked(), codes)
    zero = part.scales().zero
    assert zero is not None
    assert scales.zero is not None
    assert torch.equal(zero, scales.zero)


def test_broken_tensors_are_refused_with_what_was_found() -> None:
    part, _ = part_and_values("int4-g8-z")
    tensors, meta = part.tensors(), part.meta()
    cases = [
        ({**tensors, "codes": tensors["codes"][1:]}, meta, r"codes torch.uint8 \[8, 11\]"),
        ({**tensors, "scale": tensors["scale"].float()}, meta, "scale torch.float32"),
        ({name: tensors[name] for name in ("codes", "scale")}, meta, r"\['codes', 'scale'\]"),
        ({**tensors, "extra": tensors["scale"]}, meta, "extra"),
        (tensors, {**meta, "grid": "int4-g8"}, "zero"),
        (tensors, {**meta, "more": "x"}, "more"),
        (tensors, {"type": "quantized"}, "grid"),
        (tensors, {**meta, "type": "dense"}, "type"),
        (tensors, {**meta, "grid": "bf16"}, "integer grid"),
        (tensors, {**meta, "grid": "int44-g8"}, "not a grid"),
    ]
    for broken, description, message in cases:
        with pytest.raises(ValueError, match=message):
            Quantized.load(broken, description, SHAPE)


def test_dense_part_keeps_its_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.randn(SHAPE).to(dtype)
        part = Dense.load({"weight": weight}, {"type": "dense"}, SHAPE)
        assert part.nbytes == weight.nbytes
        assert torch.equal(part.dense(), weight.float())
    with pytest.raises(ValueError, match=r"expected weight torch.float32 \[9, 21\]"):
        Dense.load({"weight": torch.zeros(SHAPE, dtype=torch.int8)}, {"type": "dense"}, SHAPE)
    with pytest.raises(ValueError, match=r"\[9, 20\]"):
        Dense.load({"weight": torch.zeros(9, 20)}, {"type": "dense"}, SHAPE)
