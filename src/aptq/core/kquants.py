"""Super-block types of GGUF: groups whose scales are themselves integers on a scale of 256 columns.

A stored code u stands for d a (u - offset) - e b, with d, e float16 for each super-block of 256
columns, a, b whole numbers for each group; IQ4_XS has a table in place of u - offset.  The fit is
ours; bytes are in kbytes.py.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SUPER = 256  # columns of a super-block
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LEAST = 2.0**-14  # d of a super-block of zeros: a scale is never 0, so that all may divide by it
SHRINKS = tuple(1.0 - 0.05 * step for step in range(9))  # shares of a group's range that are tried


@dataclass(frozen=True, slots=True)
class KQuant:
    """One type: bits of a code, columns of a group, whole numbers low..high that scale it."""

    name: str
    bits: int
    group: int
    low: int
    high: int
    minimum: bool  # does a group have a minimum, with numbers 0..high?
    nbytes: int  # of a super-block

    @property
    def even(self) -> bool:
        """Are levels at equal distances?"""
        return self.name != "iq4_xs"

    def levels(self) -> Tensor:
        """What the codes stand for in units of their scale, float32 [2^bits], ascending."""
        if not self.even:
            return torch.tensor(IQ4, dtype=torch.float32)
        offset = 0 if self.minimum else 1 << (self.bits - 1)
        return torch.arange(1 << self.bits, dtype=torch.float32) - offset


KQUANTS = {
    one.name: one
    for one in (
        KQuant("q2_k", 2, 16, 0, 15, True, 84),
        KQuant("q3_k", 3, 16, -32, 31, False, 110),
        KQuant("iq4_xs", 4, 32, -32, 31, False, 136),
        KQuant("q4_k", 4, 32, 0, 63, True, 144),
        KQuant("q5_k", 5, 32, 0, 63, True, 176),
        KQuant("q6_k", 6, 16, -128, 127, False, 210),
    )
}


class Steps(NamedTuple):
    """Scales of a weight [out, in], in = 256 n; minima and below are None in types without them."""

    scales: Tensor  # int16 [out, in / group]: a
    minima: Tensor | None  # int16 [out, in / group]: b
    above: Tensor  # float16 [out, n]: d
    below: Tensor | None  # float16 [out, n]: e

    def effective(self, kind: KQuant) -> tuple[Tensor, Tensor]:
        """(scale d a, minimum e b) of every group, float32 [out, in / group], exact."""
        inside = SUPER // kind.group
        scale = self.scales.float() * self.above.float().repeat_interleave(inside, 1)
        if self.minima is None or self.below is None:
            return scale, torch.zeros_like(scale)
        return scale, self.minima.float() * self.below.float().repeat_interleave(inside, 1)


def encode(weight: Tensor, scale: Tensor, low: Tensor, kind: KQuant) -> Tensor:
    """Nearest codes, uint8, of a weight whose scale and minimum broadcast against it."""
    levels = kind.levels().to(weight.device)
    safe = torch.where(scale == 0, 1.0, scale)
    value = torch.where(scale == 0, 0.0, (weight + low) / safe)
    if not kind.even:
        return between(value).to(torch.uint8)
    return (value - levels[0]).round_().clamp_(0, len(levels) - 1).to(torch.uint8)


def between(values: Tensor) -> Tensor:
    """Numbers of IQ4's levels nearest to values; the lower one of two.

    Borders are whole in units of a half, so one look-up replaces a search among them.
    """
    reach, owner = _owners(values.device)
    return owner[(values * 2).ceil_().clamp_(-reach, reach).long() + reach]


@cache  # a sweep asks for every column
def _owners(device: torch.device) -> tuple[int, Tensor]:
    """(reach, number of the nearest level for each half from -reach to reach)."""
    levels, reach = torch.tensor(IQ4, device=device), 2 * max(map(abs, IQ4))
    halves = torch.arange(-reach, reach + 1, device=device)
    return reach, torch.bucketize(halves, levels[1:] + levels[:-1])


def decode(codes: Tensor, scale: Tensor, low: Tensor, kind: KQuant) -> Tensor:
    """Values float32 of codes, as ggml computes them."""
    return kind.levels().to(codes.device)[codes.long()] * scale - low


def fit(weight: Tensor, kind: KQuant, *, importance: Tensor | None = None) -> Steps:
    """Scales for weight float32 [out, in]; importance [in] or [out, in] >= 0 weighs the errors.

    Each group by itself first: shares of its range, each followed by the least squares for its
    codes.  Then d and e of a super-block from its largest group, and for each group the pair of
    whole numbers next to its own with the least error.
    """
    out, columns = weight.shape
    assert columns % SUPER == 0, (columns, SUPER)
    W, V = _grouped(weight, importance, kind.group)
    scale, low = _groups(W, V, kind)
    inside = SUPER // kind.group
    above = _unit(scale.view(out, -1, inside), kind)
    d = above.float().repeat_interleave(inside, 1)
    below = e = None
    if kind.minimum:
        below = (low.view(out, -1, inside).amax(-1) / kind.high).half()
        e = below.float().repeat_interleave(inside, 1)
    a, b = _numbers(W, V, kind, (scale, low), d, e)
    return Steps(a, b if kind.minimum else None, above, below)


def table_scales(weight: Tensor, importance: Tensor | None) -> Tensor:
    """Real scales float32 [out, in / 32] for the levels of IQ4; arguments as in `fit`."""
    kind = KQUANTS["iq4_xs"]
    W, V = _grouped(weight, importance, kind.group)
    return _groups(W, V, kind)[0]


def _grouped(weight: Tensor, importance: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Weight and importance as [out, groups, size], float32."""
    W = weight.detach().float().view(len(weight), -1, size)
    if importance is None:
        return W, torch.ones_like(W)
    return W, importance.to(W).expand(weight.shape).reshape(W.shape) + 1e-12


def _unit(scale: Tensor, kind: KQuant) -> Tensor:
    """d [out, n] float16 of scales [out, n, groups]: the largest gets the extreme number."""
    most = scale.gather(-1, scale.abs().argmax(-1, keepdim=True)).squeeze(-1)
    found = (most / (kind.low or kind.high)).half()
    return torch.where(found == 0, LEAST, found)


def _groups(W: Tensor, V: Tensor, kind: KQuant) -> tuple[Tensor, Tensor]:
    """Best real scale and minimum of each group, [out, groups]; V weighs errors of W like it."""
    levels = kind.levels().to(W.device)
    lo, hi = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)
    extreme = torch.where(-lo > hi, lo, hi)
    best = torch.full_like(lo, torch.inf)
    scale, low = torch.zeros_like(lo), torch.zeros_like(lo)
    for share in SHRINKS:
        if kind.minimum:
            s, m = (hi - lo) * share / levels[-1], -lo * share
        else:
            s, m = extreme * share / levels[0], torch.zeros_like(lo)
        for tried, least in ((s, m), _least_squares(W, V, s, m, kind)):
            error = _error(W, V, tried, least, kind)
            better = error < best
            best = torch.where(better, error, best)
            scale, low = torch.where(better, tried, scale), torch.where(better, least, low)
    return scale, low


def _least_squares(
    W: Tensor, V: Tensor, s: Tensor, m: Tensor, kind: KQuant
) -> tuple[Tensor, Tensor]:
    """Scale and minimum of least error for the codes that these give."""
    levels = kind.levels().to(W.device)
    C = levels[encode(W, s[..., None], m[..., None], kind).long()]
    cc, cw, c, w, one = ((V * x).sum(-1) for x in (C * C, C * W, C, W, torch.ones_like(W)))
    if not kind.minimum:
        return torch.where(cc > 0, cw / cc.clamp(min=1e-30), s), m
    size = cc * one - c * c
    good = size > 1e-12 * cc * one
    fresh = (cw * one - c * w) / torch.where(good, size, 1.0)
    shift = (fresh * c - w) / one
    good &= (fresh > 0) & (shift >= 0)
    return torch.where(good, fresh, s), torch.where(good, shift, m)


def _error(W: Tensor, V: Tensor, s: Tensor, m: Tensor, kind: KQuant) -> Tensor:
    s, m = s[..., None], m[..., None]
    return (V * (decode(encode(W, s, m, kind), s, m, kind) - W).square()).sum(-1)


def _numbers(
    W: Tensor,
    V: Tensor,
    kind: KQuant,
    real: tuple[Tensor, Tensor],
    d: Tensor,
    e: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Whole numbers (a, b) int16 [out, groups] near real scales and minima, of least error."""

    def near(value: Tensor, unit: Tensor, least: int) -> list[Tensor]:
        ratio = torch.where(unit == 0, 0.0, value / torch.where(unit == 0, 1.0, unit)).round()
        return [(ratio + step).clamp(least, kind.high) for step in (0, -1, 1)]

    scale, low = real
    chosen_a = chosen_b = torch.zeros_like(scale)
    best = torch.full_like(scale, torch.inf)
    for a in near(scale, d, kind.low):
        a = torch.where(a == 0, 1.0, a)
        for b in near(low, e, 0) if e is not None else [torch.zeros_like(a)]:
            error = _error(W, V, a * d, b * e if e is not None else b, kind)
            better = error < best
            best = torch.where(better, error, best)
            chosen_a, chosen_b = torch.where(better, a, chosen_a), torch.where(better, b, chosen_b)
    return chosen_a.to(torch.int16), chosen_b.to(torch.int16)


def recovered(scale: Tensor, low: Tensor, kind: KQuant) -> Steps:
    """Steps of effective scales and minima float32 [out, in / group]: the inverse of `effective`.

    Raises ValueError for scales that are no whole numbers of one unit in a super-block.
    """
    least = kind.low or 1
    above, a = _units(scale, SUPER // kind.group, range(least, kind.high + 1), 0.0)
    if not kind.minimum:
        return Steps(a, None, above, None)
    below, b = _units(low, SUPER // kind.group, range(1, kind.high + 1), 1e-5)
    return Steps(a, b, above, below)


def _units(values: Tensor, inside: int, numbers: range, slack: float) -> tuple[Tensor, Tensor]:
    """(unit float16 [out, n], whole numbers int16 [out, groups]) whose products are the values."""
    V = values.view(len(values), -1, inside)
    most = V.gather(-1, V.abs().argmax(-1, keepdim=True))
    unit, whole = torch.zeros_like(most), torch.zeros_like(V)
    open_ = most != 0
    for number in numbers:
        if number == 0 or not bool(open_.any()):
            continue
        tried = (most / number).half().float()
        ratio = (V / torch.where(tried == 0, 1.0, tried)).round()
        near = (ratio * tried - V).abs() <= slack * most.abs()
        near &= (ratio >= min(numbers[0], 0)) & (ratio <= numbers[-1])
        good = open_ & near.all(-1, keepdim=True) & (tried != 0)
        unit, whole = torch.where(good, tried, unit), torch.where(good, ratio, whole)
        open_ = open_ & ~good
    if bool(open_.any()):
        raise ValueError(
            "scales cannot be stored in super-blocks\n"
            f"{int(open_.sum())} of {open_.numel()} have groups that are no multiples of one unit\n"
            "use rtn or gptq with these types: other stages make scales of their own"
        )
    return unit.squeeze(-1).half(), whole.flatten(1).to(torch.int16)
