"""Give freed memory back to the system, so that the peak does not grow with the number of blocks.

glibc keeps freed tensors of up to 32 MiB in heaps that become fragmented: a peak grew with the
number of blocks although the living tensors stayed the same (docs/log.md has the figures).
"""

import ctypes
import platform

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
LARGE = 8 << 20  # bytes; at 1 MiB the page faults cost 40 % more CPU time, at 8 MiB none


def bound_heap() -> None:
    """For the rest of the process, map allocations from 8 MiB on directly; only with glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


def trim_heap() -> None:
    """Return the free pages of all heaps; only with glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
