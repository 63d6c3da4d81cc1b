"""Sums of parts: texts, exact bytes, factors and single weights that come back as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aptq.core.grid import Grid
from aptq.core.parts import PARTS, LowRank, Part, Sparse, empty_part, load_part, part_specs
from aptq.core.plan import PartSpec, Target

SHAPE = (9, 21)
TEXTS = ["r1", "r5", "r3@int8-row", "r4@int4-g8-z", "o0.5%", "o7%", "o33.33%"]


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(3))


def made(text: str) -> tuple[Part, Tensor]:
    """A part and the weight that it holds as far as it can."""
    spec = PartSpec.parse(text)
    if spec.kind == "lowrank":
        left, right = normal(SHAPE[0], spec.rank).bfloat16(), normal(spec.rank, SHAPE[1]).bfloat16()
        return LowRank.make(left.float(), right.float(), spec), left.float() @ right.float()
    weight = normal(*SHAPE).bfloat16().float()
    top = weight.abs().flatten().topk(spec.count(SHAPE)).indices
    mask = torch.zeros(SHAPE, dtype=torch.bool).flatten().scatter(0, top, True).view(SHAPE)
    return Sparse.make(weight, mask, spec), weight * mask


@pytest.mark.parametrize("text", TEXTS)
def test_holds_the_values_in_exactly_the_bytes_of_the_text(text: str) -> None:
    part, values = made(text)
    spec = PartSpec.parse(text)
    assert str(spec) == text
    assert part.shape == SHAPE
    near = 0.0 if "@" not in text else 0.3
    torch.testing.assert_close(part.dense(), values, rtol=near, atol=near * 2 + 1e-5 * (near > 0))
    assert part.nbytes == spec.nbytes(SHAPE)
    assert part.nbytes == sum(tensor.nbytes for tensor in part.tensors().values())
    found = {name: (t.dtype, tuple(t.shape)) for name, t in part.tensors().items()}
    assert found == part_specs(spec, SHAPE)
    assert all(t.is_contiguous() for t in part.tensors().values())


@pytest.mark.parametrize("text", TEXTS)
def test_rows_and_loading(text: str) -> None:
    part, _ = made(text)
    for start in range(9):
        for stop in range(start + 1, 10):
            torch.testing.assert_close(part.rows(start, stop), part.dense()[start:stop])
    loaded = load_part(PartSpec.parse(text), SHAPE, part.tensors().__getitem__)
    assert torch.equal(loaded.dense(), part.dense())
    assert loaded.meta() == part.meta()
    assert type(PARTS[part.meta()["type"]].load(part.tensors(), part.meta(), SHAPE)) is type(part)
    assert empty_part(PartSpec.parse(text), SHAPE).nbytes == part.nbytes


def test_the_mask_comes_back() -> None:
    part, values = made("o7%")
    assert isinstance(part, Sparse)
    assert torch.equal(part.mask(), values != 0)


def test_wide_rows_have_wide_places() -> None:
    spec, shape = PartSpec.parse("o0.01%"), (1, 70_000)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, 69_993:] = True
    part = Sparse.make(torch.ones(shape), mask, spec)
    assert part.columns.dtype == torch.int32
    assert part.dense().nonzero()[:, 1].tolist() == list(range(69_993, 70_000))
    assert part.nbytes == spec.nbytes(shape) == 7 * 6 + 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"starts": torch.tensor([0, *[3] * 4, 2, *[13] * 4], dtype=torch.int32)}, "ascending"),
        ({"starts": torch.full((10,), 13, dtype=torch.int32)}, "from 0"),
        ({"columns": torch.full((13,), 21).to(torch.uint16)}, "less than 21"),
        ({"values": torch.zeros(12, dtype=torch.bfloat16)}, "values"),
    ],
)
def test_places_that_do_not_exist(change: dict[str, Tensor], words: str) -> None:
    part, _ = made("o7%")
    assert part.nbytes == 13 * 4 + 40
    with pytest.raises(ValueError, match=words):
        Sparse.load({**part.tensors(), **change}, part.meta(), SHAPE)


@given(
    grids=st.lists(st.sampled_from(["int2-g32-z", "int4-g64", "bf16"]), max_size=2),
    outliers=st.integers(0, 9999),
    rank=st.integers(0, 300),
    factors=st.sampled_from(["", "@int8-row", "@int4-g32-z"]),
)
def test_texts_of_targets(grids: list[str], outliers: int, rank: int, factors: str) -> None:
    parts = [PartSpec(Grid.parse(text)) for text in sorted(grids, key="bf16".__eq__)]
    parts += [PartSpec(outliers=outliers)] if outliers else []
    parts += [PartSpec(Grid.parse(factors[1:]) if factors else None, rank=rank)] if rank else []
    target = Target(tuple(parts))
    assert Target.parse(str(target)) == target
    assert target.grid == (Grid.parse(grids[0]) if len(grids) == 1 else None)


@pytest.mark.parametrize(
    "text", ["r0", "r-1", "o0%", "o100%", "o0.001%", "r4@bf16", "r4+int4-g32", "r4+r4", "o1%+o2%"]
)
def test_texts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"no part of a weight|no sum of parts|grid"):
        Target.parse(text)


def test_what_fits() -> None:
    assert Target.parse("int4-g32+r9").fits(SHAPE)
    assert not Target.parse("int4-g32+r10").fits(SHAPE)
