"""Lanes: every width, group and zero against the decoded weight, with outputs poisoned before."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from aptq.core.parts import Quantized
from aptq.kernels import cpu_lanes
from aptq.kernels.cpu import Int4
from aptq.kernels.cpu_lanes import GROWTH, MANY, Lanes
from aptq.kernels.dispatch import prepare
from aptq.kernels.reference import Tiled
from aptq.runtime.embedding import kernel_rows
from aptq.runtime.linear import PackedLinear
from tests.kernels.samples import randn, sample
from tests.kernels.test_kernels import CPU, ROUNDING, off

OUT, IN = 316, 500  # no multiple of 32: the last tile, chunk and group are filled up


def lanes(text: str, out: int = OUT, columns: int = IN) -> tuple[Quantized, Lanes]:
    part = sample(text, out, columns)
    kernel = prepare(part, torch.bfloat16)
    assert isinstance(part, Quantized)
    assert isinstance(kernel, Lanes)
    return part, kernel


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels ask memory for holds NaN: an element that is not written shows."""
    fresh, empty = Tensor.new_empty, torch.empty

    def filled(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **more: filled(fresh(*args, **more)))
    monkeypatch.setattr(torch, "empty", lambda *args, **more: filled(empty(*args, **more)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("suffix", ["", "-z", "-fz", "-bf16", "-fz-bf16"])
@pytest.mark.parametrize("group", ["g32", "g64", "g96", "g128", "row"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_grid_agrees_with_the_decoded_weight(bits: int, group: str, suffix: str) -> None:
    part, kernel = lanes(f"int{bits}-{group}{suffix}")
    for dtype, most in ROUNDING.items():
        for rows in (0, 1, 2, 3, 15, MANY):  # 15 = 8 + 4 + 2 + 1: every width of the inner step
            x = randn(rows, IN, seed=rows).to(dtype)
            y = kernel(x)
            assert y.shape == (rows, OUT)
            assert y.dtype == dtype
            if rows:
                assert off(y, x, part) < most, (rows, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape", [(32, 32), (31, 64), (64, 60), (192, 576), (1000, 96), (32, 2080)]
)
def test_shapes(shape: tuple[int, int]) -> None:
    part, kernel = lanes("int3-g64-z", *shape)
    for rows in (1, 5, MANY + 3):
        x, bias = randn(rows, shape[1]), randn(shape[0], seed=1)
        assert off(kernel(x, bias), x, part, bias) < ROUNDING[torch.float32]


@pytest.mark.parametrize(
    "text", ["int2-g32-z", "int3-row-fz", "int5-g64", "int6-g128-z", "int8-g32"]
)
def test_rows_are_those_of_the_weight(text: str) -> None:
    part, kernel = lanes(text)
    wanted = torch.tensor([3, OUT - 1, 3, 0, 31, 32])
    assert torch.equal(kernel_rows(kernel, wanted), part.dense()[wanted])


@pytest.mark.parametrize("text", ["int3-g64-z", "int4-g32", "int6-row-fz"])
def test_decoded_tiles_hold_the_weights_of_the_reference(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_lanes, "CACHE_TILE", 3 * 32 * IN)  # four tiles, the last a short one
    part, kernel = lanes(text)
    for dtype in ROUNDING:  # no sums, so any difference is in the weights
        assert torch.equal(kernel(torch.eye(IN, dtype=dtype)), part.dense(dtype).T)


def test_bytes_are_those_of_the_part() -> None:
    for text in ("int2-g32-z", "int3-g64-z", "int6-g128-fz", "int5-row"):
        part, kernel = lanes(text, 576, 576)
        held = sum(buffer.nbytes for buffer in kernel.buffers())
        assert held <= GROWTH * part.nbytes
        assert part.codes.nbytes == kernel.words.nbytes


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("int3-g48", (96, 96)),  # a group ends inside of a step
        ("int3-g16-z", (96, 96)),
        ("int3-g64-z", (33, 96)),  # filled up to 64 rows
        ("int3-g64-z", (96, 33)),
        ("q4_k", (64, 256)),
        ("iq4_nl", (64, 64)),
    ],
)
def test_what_it_leaves_to_others(text: str, shape: tuple[int, int]) -> None:
    assert not isinstance(prepare(sample(text, *shape), torch.bfloat16), Lanes)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    part = sample("int4-g64-z", 64, 128)
    assert Lanes.supports(part, CPU, torch.bfloat16)
    monkeypatch.setattr(cpu_lanes, "_numba", lambda: False)
    assert type(prepare(part, torch.bfloat16)) is Int4
    assert type(prepare(sample("int3-g64-z", 64, 128), torch.bfloat16)) is Tiled
    code = (
        "import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None\n"
        "import aptq.runtime.embedding, aptq.kernels.dispatch; print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported", done.stderr


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    _, kernel = lanes("int3-g64-z")
    before = torch.get_num_threads()
    try:
        for rows in (1, 9):
            x = randn(rows, IN).bfloat16()
            torch.set_num_threads(1)
            alone = kernel(x)
            torch.set_num_threads(threads)
            assert torch.equal(kernel(x), alone)
    finally:
        torch.set_num_threads(before)


def test_calls_at_the_same_time_do_not_disturb_each_other() -> None:
    _, kernel = lanes("int3-g64-z")
    inputs = [randn(1 + seed % 7, IN, seed=seed).bfloat16() for seed in range(40)]
    expected = [kernel(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(kernel, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_thread_does_it_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    part, kernel = lanes("int5-g64-z")

    def nothing(_name: None) -> object:
        return object()

    cpu_lanes._team.cache_clear()
    monkeypatch.setattr(cpu_lanes.ctypes, "CDLL", nothing)
    try:
        for rows in (2, MANY):
            x = randn(rows, IN)
            assert off(kernel(x), x, part) < ROUNDING[torch.float32]
    finally:
        cpu_lanes._team.cache_clear()


def test_what_is_not_finite_stays_so() -> None:
    _, kernel = lanes("int3-g64-z")
    for value in (float("inf"), float("nan")):
        for dtype in ROUNDING:
            x = randn(1, IN).to(dtype)
            x[0, 7] = value
            assert not kernel(x).isfinite().any()


def test_smallest_scales_are_exact() -> None:
    part = sample("int3-g64-z", 64, 64)
    assert isinstance(part, Quantized)
    part.scale[:, 0] = torch.arange(1, 65).half() * 2.0**-24  # subnormal float16
    kernel = prepare(part, torch.float32)
    x = randn(1, 64)
    assert off(kernel(x) * 2.0**20, x * 2.0**20, part) < ROUNDING[torch.float32]


def test_bfloat16_outputs_are_rounded_to_nearest() -> None:
    _, kernel = lanes("int3-g64-z")
    x = randn(5, IN).bfloat16()
    assert torch.equal(kernel(x), kernel(x.float()).bfloat16())


def test_sums_are_float32_where_inputs_have_a_mean() -> None:
    part, kernel = lanes("int3-row-z", 64, 8192)
    x = (1 + 0.01 * randn(1, 8192)).bfloat16()
    assert off(kernel(x), x, part) < ROUNDING[torch.bfloat16]


def test_a_copy_and_a_change_of_dtype_compute_the_same() -> None:
    _, kernel = lanes("int3-g64-z")
    x = randn(2, IN).bfloat16()
    y = kernel(x)
    assert torch.equal(deepcopy(kernel)(x), y)
    assert torch.equal(kernel.half()(x), y)


@pytest.mark.parametrize("rows", [2, MANY])
def test_gradients_reach_the_input(rows: int) -> None:
    part, kernel = lanes("int3-g64-z")
    x = randn(rows, IN).requires_grad_()
    up = randn(rows, OUT, seed=1)
    (kernel(x) * up).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, up @ part.dense(), atol=1e-4)


def test_activations_of_another_device_are_refused() -> None:
    _, kernel = lanes("int3-g64-z")
    with pytest.raises(ValueError, match=r"(?s)another device.*meta.*load the"):
        kernel(torch.empty(1, IN, device="meta"))


def test_a_packed_linear_takes_views() -> None:
    part = sample("int3-g64-z", 64, 128)
    layer: nn.Module = PackedLinear([part, part])
    layer.prepare(torch.float32)  # type: ignore[operator]
    x = randn(3, 2, 128).transpose(0, 1)
    assert torch.allclose(layer(x), 2 * x @ part.dense().T, atol=1e-4)


def test_a_copy_reads_its_own_memory() -> None:
    part, kernel = lanes("int3-g32-z")
    x = randn(2, IN)
    wanted = kernel(x).clone()  # from here on it knows where its words lie
    other = deepcopy(kernel)
    for tensor in kernel.buffers():
        tensor.zero_()
    assert torch.equal(other(x), wanted)
    assert part.shape == other.shape
