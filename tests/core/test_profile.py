"""Profiles: bins by the bits of a position, weights of mean one at any window length."""

import pytest
import torch

from aptq.core.profile import bin_of, row_weights


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 9, 2048])
def test_bin_is_the_bit_length(length: int) -> None:
    assert bin_of(length).tolist() == [position.bit_length() for position in range(length)]


def test_weights_follow_the_profile() -> None:
    weights = row_weights(torch.tensor([8.0, 4.0, 2.0, 1.0]), 8, 8)
    expected = torch.tensor([8.0, 4, 2, 2, 1, 1, 1, 1])
    torch.testing.assert_close(weights, expected / expected.mean())
    assert weights.dtype == torch.float32


def test_other_lengths() -> None:
    """Beyond the measured window the last bin goes on; the first token grows with the window."""
    profile = torch.tensor([8.0, 4.0, 2.0, 1.0])
    longer = torch.tensor([16.0, 4, 2, 2] + [1.0] * 12)
    torch.testing.assert_close(row_weights(profile, 8, 16), longer / longer.mean())
    shorter = torch.tensor([3.0, 4, 2])
    torch.testing.assert_close(row_weights(profile, 8, 3), shorter / shorter.mean())


def test_no_gradient_anywhere_weighs_rows_alike() -> None:
    assert row_weights(torch.zeros(4), 8, 8).tolist() == [1.0] * 8
