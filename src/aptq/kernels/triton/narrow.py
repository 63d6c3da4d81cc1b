"""Narrow factors in the launch of a packed product: shared out to its first programs.

They leave their shares of x @ right.T; the programs of the product add them up and multiply with
the other factor.
"""

import triton
import triton.language as tl


@triton.jit
def narrow(
    x, right, parts, flag, rows, columns, ALL: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
    RUNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A share of x [rows, columns] @ right [ALL, columns].T: of RUNS * BK columns, into `parts`.

    parts: [programs, rows, ALL]; counted at `flag`.
    """
    b, r = tl.program_id(2) * BB + tl.arange(0, BB), tl.arange(0, ALL)
    here, acc = (b < rows)[None, :], tl.zeros([ALL, BB], tl.float32)
    for run in range(RUNS):
        k = (tl.program_id(0) * RUNS + run) * BK + tl.arange(0, BK)
        known = k < columns
        ws = tl.load(right + r[:, None] * columns + k[None, :], mask=known[None, :], other=0.0)
        x_at = x + b[None, :] * columns + k[:, None]
        xs = tl.load(x_at, mask=here & known[:, None], other=0.0)
        if not ASM:
            ws, xs = ws.to(tl.float32), xs.to(tl.float32)
        acc = tl.dot(ws, xs, acc)
    at = parts + tl.program_id(0) * rows * ALL + b[None, :] * ALL + r[:, None]
    tl.store(at, acc, mask=here)
    tl.debug_barrier()  # all of it, before it counts
    tl.atomic_add(flag, 1, sem="acq_rel")


@triton.jit
def awaited(
    parts, flag, heads, rows, b, known, RANK: tl.constexpr, ALL: tl.constexpr, BB: tl.constexpr
):
    """The sum of what `narrow` left in `parts`, [RANK, BB] float32."""
    # those programs are the first of the grid: all run or have run, and wait for nothing
    while tl.load(flag, volatile=True) < heads:
        pass
    tl.atomic_add(flag, 0, sem="acq_rel")  # what they wrote is seen from here on
    tl.debug_barrier()
    AT_ONCE: tl.constexpr = 8 if BB <= 16 else 2  # registers hold no more
    at = (b * ALL)[None, :] + tl.arange(0, RANK)[:, None]
    acc = tl.zeros([RANK, BB], tl.float32)
    for start in range(0, heads, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # all on their way before the first is waited for
            held = known & (start + i < heads)
            part_at = parts + (start + i) * rows * ALL + at
            acc += tl.load(part_at, mask=held, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def widened(
    acc, ls, parts, flag, heads, rows, b, known, RANK: tl.constexpr, ALL: tl.constexpr,
    BB: tl.constexpr, D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc [BN, BB] + ls [BN, RANK] @ what `narrow` made, rounded to D."""
    ts = awaited(parts, flag, heads, rows, b, known, RANK, ALL, BB).to(D)
    return tl.dot(ls if ASM else ls.to(tl.float32), ts if ASM else ts.to(tl.float32), acc)


@triton.jit
def read(flag, heads):
    """Count one more program that has read; the last leaves zeros for the next launch."""
    tl.debug_barrier()  # all of it
    if tl.atomic_add(flag + 1, 1, sem="acq_rel") == tl.num_programs(0) - heads - 1:
        tl.store(flag, 0)
        tl.store(flag + 1, 0)
