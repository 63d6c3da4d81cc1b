"""Super-block types: bytes decode to the same values in the package gguf; the fit is a good one."""

import pytest
import torch
from torch import Tensor

from aptq.core.kbytes import packed, steps_packed, steps_unpacked
from aptq.core.kquants import KQUANTS, SUPER, KQuant, Steps, between, decode, encode, fit, recovered

gguf = pytest.importorskip("gguf")


def weights(rows: int = 12, columns: int = 2 * SUPER, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator) * 0.05
    found[0] = 0
    found[1, :SUPER] = found[1, :SUPER].abs()
    found[2, 5] = 3.0
    return found


def wide(kind: KQuant, steps: Steps) -> tuple[Tensor, Tensor]:
    scale, low = (x.repeat_interleave(kind.group, 1) for x in steps.effective(kind))
    return scale, low


def theirs(data: Tensor, kind: KQuant) -> Tensor:
    type_ = gguf.GGMLQuantizationType[kind.name.upper()]
    assert gguf.GGML_QUANT_SIZES[type_] == (SUPER, kind.nbytes)
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), type_))


@pytest.mark.parametrize("kind", KQUANTS.values(), ids=KQUANTS)
def test_bytes_are_ggml_s(kind: KQuant) -> None:
    """Random whole numbers, not only those of a fit, so that every bit is used."""
    generator = torch.Generator().manual_seed(1)
    out, n, groups = 5, 3, 3 * SUPER // kind.group

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    codes = numbers(0, 2**kind.bits - 1, out, n * SUPER).to(torch.uint8)
    minima = numbers(0, kind.high, out, groups).short() if kind.minimum else None
    halves = torch.randn(2, out, n, generator=generator).half()
    below = halves[1] if kind.minimum else None
    steps = Steps(numbers(kind.low, kind.high, out, groups).short(), minima, halves[0], below)
    assert torch.equal(
        theirs(packed(codes, steps, kind), kind), decode(codes, *wide(kind, steps), kind)
    )


@pytest.mark.parametrize("kind", KQUANTS.values(), ids=KQUANTS)
def test_fit(kind: KQuant) -> None:
    W = weights()
    steps = fit(W, kind)
    scale, low = wide(kind, steps)
    codes = encode(W, scale, low, kind)
    got = decode(codes, scale, low, kind)
    assert torch.equal(theirs(packed(codes, steps, kind), kind), got)
    if kind.name != "iq4_xs":  # whose table has no 0
        assert torch.equal(got[0], W[0])
    error = (got - W)[3:].square().mean() / W[3:].square().mean()
    most = {2: 0.08, 3: 0.035, 4: 0.009, 5: 0.0022, 6: 0.0006}
    assert error < most[kind.bits], float(error)
    # no code is nearer than the one that was taken
    for other in (codes.int() - 1, codes.int() + 1):
        inside = (other >= 0) & (other < 2**kind.bits)
        far = decode(other.clamp(0, 2**kind.bits - 1), scale, low, kind)
        assert ((far - W).abs() >= (got - W).abs() - 1e-6)[inside].all()


@pytest.mark.parametrize("kind", KQUANTS.values(), ids=KQUANTS)
def test_steps_are_stored_in_the_bytes_that_codes_leave(kind: KQuant) -> None:
    steps = fit(weights(), kind)
    stored = steps_packed(steps, kind)
    assert stored.dtype == torch.uint8
    assert stored.shape == (12, 2 * (kind.nbytes - SUPER * kind.bits // 8))
    again = steps_unpacked(stored, kind)
    for one, other in zip(steps, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("kind", KQUANTS.values(), ids=KQUANTS)
def test_steps_come_back_from_effective_scales(kind: KQuant) -> None:
    scale, low = fit(weights(), kind).effective(kind)
    assert (scale != 0).all()
    zero = low / scale  # as the rest of the program has minima
    again = recovered(scale, zero * scale, kind).effective(kind)
    assert torch.equal(again[0], scale)
    torch.testing.assert_close(again[1], low, rtol=1e-5, atol=1e-9)
    scale[3, 0] *= 1.001
    with pytest.raises(ValueError, match="super-blocks"):
        recovered(scale, low, kind)


@pytest.mark.parametrize("kind", KQUANTS.values(), ids=KQUANTS)
def test_importance_counts(kind: KQuant) -> None:
    W, heavy = weights(), torch.ones(2 * SUPER)
    heavy[::7] = 100.0

    def loss(importance: Tensor | None) -> Tensor:
        steps = fit(W, kind, importance=importance)
        scale, low = wide(kind, steps)
        error = decode(encode(W, scale, low, kind), scale, low, kind) - W
        return (heavy * error.square()).sum()

    assert loss(heavy) < 0.97 * loss(None)


@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_better_than_the_largest_value(name: str) -> None:
    """The search must beat ranges from end to end, rounded to their whole numbers."""
    kind, W = KQUANTS[name], weights()[3:]
    steps = fit(W, kind)
    scale, low = wide(kind, steps)
    ours = (decode(encode(W, scale, low, kind), scale, low, kind) - W).square().sum()
    groups = W.view(len(W), -1, kind.group)
    lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    span = (hi - lo) / 15 if kind.minimum else torch.maximum(-lo, hi) / 31
    scale, low = (x.repeat_interleave(kind.group, 1) for x in (span, -lo * kind.minimum))
    plain = decode(encode(W, scale, low, kind), scale, low, kind)
    assert ours < (plain - W).square().sum()


def test_between_takes_the_nearest_level() -> None:
    levels = KQUANTS["iq4_xs"].levels()
    values = torch.cat([torch.linspace(-200, 200, 4001), (levels[1:] + levels[:-1]) / 2])
    nearest = (values[:, None] - levels).abs().argmin(1)
    assert torch.equal(levels[between(values)], levels[nearest])
