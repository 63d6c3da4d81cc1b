"""Freed tensors go back to the system."""

import platform
from pathlib import Path

import pytest
import torch

from aptq.engine.heap import trim_heap

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory in this way"
)


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def test_trim_returns_what_fragments_hold() -> None:
    held = [torch.ones(1 << 14) for _ in range(2000)]  # 64 KiB each: below every mmap threshold
    pinned = held[::40]  # living tensors in between
    before = anonymous()
    del held
    trim_heap()
    assert before - anonymous() > 64 << 20
    assert len(pinned) == 50
