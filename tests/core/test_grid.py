"""Grids: the text form is exact both ways, bad ones are refused with a way out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aptq.core.grid import ELEMENTS, Grid

GRIDS = st.builds(
    Grid,
    element=st.sampled_from(sorted(ELEMENTS)),
    group=st.integers(0, 5000),
    zero=st.sampled_from(["none", "int", "float"]),
    scale=st.sampled_from(["fp16", "bf16"]),
)


@settings(max_examples=100, deadline=None)
@given(grid=GRIDS)
def test_parse_inverts_str(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("int4-g64-z", Grid("int4", 64, "int")),
        ("int3-g128", Grid("int3", 128)),
        ("int4-row", Grid("int4", 0)),
        ("int8-g32-fz", Grid("int8", 32, "float")),
        ("int4-g64-z-bf16", Grid("int4", 64, "int", "bf16")),
        ("bf16", Grid("bf16")),
    ],
)
def test_text_form(text: str, grid: Grid) -> None:
    assert Grid.parse(text) == grid
    assert str(grid) == text


@pytest.mark.parametrize(
    "text", ["", "int4", "int9-g64", "int4-g0", "int4-g064", "INT4-g64", "int4-g64-q", "int4-g64\n"]
)
def test_bad_text_is_refused_in_three_lines(text: str) -> None:
    with pytest.raises(ValueError, match="not a grid") as caught:
        Grid.parse(text)
    assert "try " in str(caught.value)
    if "\n" not in text:
        assert len(str(caught.value).splitlines()) == 3


def test_close_matches_are_suggested() -> None:
    with pytest.raises(ValueError, match="try int4-g64-z"):
        Grid.parse("int4-g64z")
    with pytest.raises(ValueError, match="try int5, "):
        Grid(element="int55")
    with pytest.raises(ValueError, match="group must be >= 0"):
        Grid(group=-1)


def test_groups_of_a_width_that_the_group_does_not_divide() -> None:
    grid = Grid(group=4)
    assert grid.groups(10) == 3
    assert grid.group_of(10).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert Grid(group=0).groups(10) == 1
    assert Grid(group=0).group_of(3).tolist() == [0, 0, 0]
    assert Grid(group=64).groups(10) == 1


def test_bytes_by_hand() -> None:
    # 3 rows of 10 columns, 3 groups: codes 3 * ceil(30 / 8), scales 2 * 9, zeros ceil(27 / 8)
    assert Grid("int3", 4, "int").nbytes((3, 10)) == 12 + 18 + 4
    assert Grid("int3", 4, "float").nbytes((3, 10)) == 12 + 18 + 18
    assert Grid("int3", 4).nbytes((3, 10)) == 12 + 18
    assert Grid("bf16").nbytes((3, 10)) == 60


def test_dense_grids_are_equal_whatever_their_other_fields() -> None:
    assert Grid("bf16") == Grid("bf16", 64, "int", "bf16")
    assert Grid("bf16").dense
    assert not Grid().dense
