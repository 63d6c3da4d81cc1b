"""Budgets: every text form, exact numbers, and refusals in three lines."""

import pytest

from aptq.core.budget import Budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("4bpw", Budget(bpw=4.0)),
        ("3.5 bpw", Budget(bpw=3.5)),
        ("4.2GiB", Budget(nbytes=int(4.2 * 2**30))),
        ("110MB", Budget(nbytes=110_000_000)),
        ("500MiB", Budget(nbytes=500 * 2**20)),
        ("12kb", Budget(nbytes=12_000)),
        ("0.57kB", Budget(nbytes=570)),  # 0.57 * 1000 is 569.9999 in floating point
        ("123B", Budget(nbytes=123)),
        ("fits 8GiB @ 8192", Budget(device_bytes=2**33, context=8192, batch=1)),
        ("fits 8GiB@8192x4", Budget(device_bytes=2**33, context=8192, batch=4)),
        ("0.05nats", Budget(loss=0.05)),
        (" 3.5bpw & 110MB ", Budget(bpw=3.5, nbytes=110_000_000)),
        (
            "110MB & 0.1nats & fits 1GB @ 9 & 3bpw",
            Budget(3.0, 110_000_000, 10**9, context=9, loss=0.1),
        ),
    ],
)
def test_forms(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


def test_lists() -> None:
    assert Budget.parse_list("3bpw, 3.5bpw & 1GB, 110MB") == (
        Budget(bpw=3.0),
        Budget(bpw=3.5, nbytes=10**9),
        Budget(nbytes=110_000_000),
    )
    assert Budget.parse_list("3bpw") == (Budget(bpw=3.0),)


@pytest.mark.parametrize(
    "text",
    [
        *("", "4", "bpw", "-4bpw", "0bpw", "4 bits", "1e3MB", "4.bpw", "nanGB", "0.4B", "3bpw, "),
        *("fits 8GiB", "fits 8GiB @ 0", "fits 8GiB @ 5x0", "fits 4bpw @ 8", "fits @ 8", "3bpw &"),
        *("3bpw & 4bpw", "1GB & 2GiB", "fits 1GB @ 8 & fits 2GB @ 8", "3bpw, 3.0bpw"),
    ],
)
def test_bad_budgets_are_refused_in_three_lines(text: str) -> None:
    with pytest.raises(ValueError, match="not a budget") as caught:
        Budget.parse_list(text)
    assert len(str(caught.value).splitlines()) == 3


def test_bits_become_whole_bytes_without_rounding_errors() -> None:
    assert Budget(bpw=4.1).linear_bytes(240) == 123  # 4.1 * 240 / 8 is 122.99... in floats
    assert Budget(bpw=3.3).linear_bytes(80) == 33
    assert Budget(bpw=3.3).linear_bytes(79) == 32
    assert Budget(nbytes=5).linear_bytes(80) is None
