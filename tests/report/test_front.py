"""The picture of the front in characters: ends in the corners, marks on the line."""

from aptq.report.front import HEIGHT, WIDTH, picture


def test_ends_lie_in_the_corners() -> None:
    lines = picture([(2.0, 1.0), (3.0, 0.1), (4.0, 0.01)], [(3.0, 0.1)]).splitlines()
    assert len(lines) == HEIGHT + 2
    drawn = [line.partition("|")[2] for line in lines[:HEIGHT]]
    assert drawn[0][0] == drawn[-1][WIDTH - 1] == "•"
    assert sum(line.count("•") for line in drawn) == 2
    assert sum(line.count("O") for line in drawn) == 1
    assert lines[0].split("|")[0].strip() == "1"
    assert lines[HEIGHT - 1].split("|")[0].strip() == "0.01"
    assert lines[-1].split() == ["2", "4"]


def test_nothing_to_draw() -> None:
    assert picture([]) == ""
    assert picture([(2.0, 1.0), (16.0, 0.0)]) == ""  # a loss of zero has no logarithm
