"""Packing is a bit stream: held against Python's big integers, for every width and odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptq.core.bits import pack, packed_size, unpack


def codes_of(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(1, 8),
    lead=st.lists(st.integers(0, 3), max_size=2),
    count=st.integers(0, 70),
    seed=st.integers(0, 99),
)
def test_unpack_inverts_pack(bits: int, lead: list[int], count: int, seed: int) -> None:
    codes = codes_of(bits, (*lead, count), seed)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, packed_size(count, bits))
    assert packed.is_contiguous()
    unpacked = unpack(packed, bits, count)
    assert torch.equal(unpacked, codes)
    assert unpacked.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_pack_is_a_little_endian_bit_stream(bits: int, count: int, seed: int) -> None:
    codes = codes_of(bits, (count,), seed)
    stream = sum(int(code) << (index * bits) for index, code in enumerate(codes))
    expected = stream.to_bytes(packed_size(count, bits), "little")
    assert bytes(pack(codes, bits).tolist()) == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_packs_views_that_are_neither_contiguous_nor_aligned(bits: int) -> None:
    codes = codes_of(bits, (11, 21), 0)
    for view in (codes.T, codes[:, 3:19], codes[1:, ::2], codes.flatten()[3:19]):
        packed = pack(view, bits)
        assert torch.equal(unpack(packed, bits, view.shape[-1]), view)
    packed = pack(codes, bits)
    wide = torch.cat([packed, packed], 1)[:, packed.shape[1] :]
    assert torch.equal(unpack(wide, bits, 21), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_leaves_its_neighbours_alone(bits: int) -> None:
    codes = torch.tensor([0, 255, 0], dtype=torch.uint8)
    assert unpack(pack(codes, bits), bits, 3).tolist() == [0, (1 << bits) - 1, 0]
