"""GPU kernels: equal to the decoded weight, interpreted on the CPU or compiled on a GPU.

Outputs are poisoned: with deterministic algorithms torch fills what is not initialised with NaN.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aptq.core.parts import Quantized
from aptq.kernels.addends import Factors
from aptq.kernels.dispatch import prepare
from aptq.kernels.reference import Reference, Tiled
from aptq.kernels.triton import tuning
from aptq.kernels.triton.layer import GROWTH, ROWS, Fused, held
from aptq.kernels.triton.layout import BITS, Layout, block_codes, layout_of, repack, units_of
from aptq.kernels.triton.tuning import Setting
from tests.kernels.samples import randn, sample

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS refuses deterministic algorithms
pytest.importorskip("triton")
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
BATCHES = (1, 3, 8, 33, 64)
SUFFIXES = ("", "-z", "-fz", "-bf16", "-fz-bf16")
GROUPS = ("g32", "g64", "g128", "row", "g96")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nobody's tuned settings
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> None:
    """Triton 3.6 takes int() of arrays of one element, which numpy 2.4 no longer knows."""
    inner = importlib.import_module("triton.runtime.interpreter")
    original = inner._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.ravel(self.handle.data)[0]))  # type: ignore[attr-defined]

    inner._patch_lang_tensor = patched


def made(text: str, out: int, columns: int, device: str) -> tuple[Quantized, Fused]:
    """A random part, and its kernel on the device."""
    part = sample(text, out, columns)
    assert isinstance(part, Quantized)
    return part, Fused(part).to(device)


def off(y: Tensor, x: Tensor, part: Quantized, bias: Tensor | None = None) -> float:
    """Relative distance to the exact product; NaN where an output was not written."""
    exact = x.double().cpu() @ part.dense().double().T
    exact = exact if bias is None else exact + bias.double().cpu()
    return float((y.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_products(bits: int, group: str, suffix: str, device: str) -> None:
    number = bits + 3 * GROUPS.index(group) + SUFFIXES.index(suffix)
    if number % 2:  # interpreting and compiling take a second or two each
        pytest.skip("every second combination, one dtype of two")
    few, dtype = device == "cpu", list(ROUNDING)[number // 4 % 2]
    out, columns = (35, 160) if few else (1000, 1120)
    part, kernel = made(f"int{bits}-{group}{suffix}", out, columns, device)
    for batch in [BATCHES[number // 2 % 5]] if few else BATCHES:
        x = randn(batch, columns, seed=1).to(device, dtype)
        assert off(kernel(x), x, part) < ROUNDING[dtype], (batch, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_chunk_and_tile(bits: int, chunk: int, device: str) -> None:
    from aptq.kernels.triton import launch

    part, _ = made(f"int{bits}-g128-z", 40, 640, device)
    layout = Layout(40, 640, bits, 128, chunk, 1)
    buffers = [t.to(device) for t in repack(part, layout) if t is not None]
    x, bias = randn(5, 640).half().to(device), randn(40, seed=1).half().to(device)
    found = []
    tiles = ((16, 1, 1), (32, 2, 4), (64, 4, 1), (128, 8, 2))
    for rows, warps, splits in tiles if device == "cuda" else tiles[1:3]:
        setting = Setting(rows, 8, warps, 3, splits)
        if setting.fits(layout):
            y = launch.run(x, *buffers, bias, layout, setting)
            assert torch.equal(y, launch.run(x, *buffers, bias, layout, setting))
            assert off(y, x, part, bias) < 1e-3, setting
            found.append(setting)
    assert found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", ["int3-g32-z", "int4-row", "int5-g64", "int8-g128-fz"])
def test_single_rows_are_those_of_the_part(text: str, device: str) -> None:
    part, kernel = made(text, 70, 160, device)
    ids = torch.tensor([69, 0, 17, 17, 16])
    assert torch.equal(kernel.rows(ids.to(device)).cpu(), part.dense()[ids])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [16, 64])
def test_factors_are_added_in_the_same_launch(rank: int, device: str) -> None:
    text, (out, columns) = "int4-g32-z", (70, 160)
    _, alone = made(text, out, columns, device)
    _, kernel = made(text, out, columns, device)
    left, right = randn(rank, out, seed=3).half(), randn(rank, columns, seed=4).half()
    assert not kernel.absorb(alone)
    assert kernel.absorb(Factors(left, right).to(device))
    assert not kernel.absorb(Factors(left, right).to(device)), "one pair only"
    bias = randn(out, seed=1).half().to(device)
    for rows in (1, 3, 17, ROWS):
        x = randn(rows, columns, seed=2).half().to(device)
        added = x.float() @ right.float().T.to(device) @ left.float().to(device)
        torch.testing.assert_close(
            kernel(x, bias).float(), alone(x, bias).float() + added, rtol=2e-3, atol=0.05 * rank
        )
        assert (kernel(x, bias).float() - alone(x, bias)).norm() > added.norm() / 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 17])
def test_joined_layers_have_factors_of_their_own(batch: int, device: str) -> None:
    from aptq.kernels.triton import launch

    part, kernel = made("int4-g32", 384, 608, device)
    left, right = randn(16, 384, seed=3).half(), randn(64, 608, seed=4).half()
    right[48:] = 0  # three times 16, padded
    x = randn(batch, 608, seed=2).half()
    storage = (kernel.codes, kernel.counts, kernel.scale, kernel.zero, None, list(kernel.layout))
    given = [t.to(device) for t in (left, right)]
    y = launch.multiply(x.to(device), *storage, *given, [128, 256])
    inner = (x.double() @ right.double().T).half().double()
    wanted = x.double() @ part.dense().double().T
    for own in range(3):
        rows = slice(128 * own, 128 * own + 128)
        added = inner[:, 16 * own : 16 * own + 16] @ left.double()[:, rows]
        piece = wanted[:, rows] + added
        assert float((y.double().cpu()[:, rows] - piece).norm() / piece.norm()) < 2e-3, own


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", ["int3-g32-z", "int4-row", "int5-g64", "int8-g128-fz"])
def test_decoded_weights_are_those_of_the_part(text: str, device: str) -> None:
    from aptq.kernels.triton import launch

    part, kernel = made(text, 70, 160, device)
    like = torch.empty(0, device=device, dtype=torch.float16)
    storage = (kernel.codes, kernel.scale, kernel.zero, kernel.layout)
    assert torch.equal(launch.expand(like, *storage, 3, 69).cpu(), part.dense(like.dtype)[3:69])
    x = randn(ROWS, 160).half().to(device)
    bias = randn(70, seed=1).half().to(device)
    assert off(kernel(x, bias), x, part, bias) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_the_edges(device: str) -> None:
    part, kernel = made("int4-g32-z", 50, 96, device)
    assert kernel(torch.empty(0, 96, dtype=torch.float16, device=device)).shape == (0, 50)
    x = randn(2, 96).half().to(device).requires_grad_()
    kernel(x).float().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0].cpu().float(), part.dense().sum(0), atol=1e-2)
    with pytest.raises(ValueError, match=r"(?s)prepared for another dtype.*float32.*load the"):
        kernel(randn(1, 96).to(device))
    before = {name: tensor.clone() for name, tensor in kernel.named_buffers()}
    for name, tensor in kernel.bfloat16().named_buffers():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_tell_their_shapes(device: str) -> None:
    from aptq.kernels.triton import launch

    _, kernel = made("int4-g32-z", 50, 96, device)
    storage = (kernel.codes, kernel.scale, kernel.zero)
    x = randn(2, 96).half().to(device)
    checks = ("test_schema", "test_faketensor")
    arguments = (x, kernel.codes, kernel.counts, *storage[1:], None, list(kernel.layout))
    torch.library.opcheck(launch.multiply, arguments, test_utils=checks)
    arguments = (x, *storage, list(kernel.layout), 1, 9)
    torch.library.opcheck(launch.expand, arguments, test_utils=checks)
    with torch.inference_mode():
        whole = torch.compile(kernel, fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x), kernel(x))


def test_layouts_hold_what_they_say() -> None:
    texts = ("int2-g128", "int3-g64-z", "int4-g32-fz", "int5-row", "int6-g96-z", "int7-g64")
    for text in (*texts, "int8-g128"):
        part = sample(text, 49, 1536)
        assert isinstance(part, Quantized)
        layout = layout_of(part.grid, part.shape)
        buffers = [t for t in repack(part, layout) if t is not None]
        assert sum(t.nbytes for t in buffers) == layout.nbytes + 4 * layout.counters
        big = layout_of(part.grid, (4096, 4096))
        assert big.nbytes <= 1.03 * part.grid.nbytes((4096, 4096)), text
        assert big.block <= 512
        for batch in (1, 8, 16, 33, 64, 200):
            assert tuning.default(big, batch, 132).fits(big), (text, batch)


@pytest.mark.parametrize(
    ("text", "shape", "fits"),
    [
        ("int4-g128", (256, 512), True),
        ("int3-g64-z", (192, 576), True),
        ("int4-row-fz", (64, 128), True),
        ("int4-row-fz", (64, 96), False),  # a third more columns would be stored
        ("int7-g128", (256, 512), True),
        ("int4-g48", (256, 480), False),
        ("int4-g16", (256, 512), False),
        ("int4-g64", (256, 520), False),
        ("int4-g32", (3, 64), False),  # 16 rows would be stored
        ("iq4_nl", (256, 512), False),
        ("q4_k", (256, 512), False),
    ],
)
def test_which_parts_are_held(text: str, shape: tuple[int, int], fits: bool) -> None:
    part = sample(text, *shape)
    assert isinstance(part, Quantized)
    layout = held(part)
    assert (layout is not None) == fits
    assert layout is None or layout.nbytes <= GROWTH * part.nbytes
    assert not Fused.supports(part, torch.device("cpu"), torch.bfloat16)


def number(bits: int, dtype: torch.dtype) -> float:
    """The value of 16 bits."""
    return float(torch.tensor(np.uint16(bits).astype(np.int16)).view(dtype))


def executed(asm: str, operands: list[int], dtype: torch.dtype) -> float:
    """What the instructions of `asm` make of 16-bit operands (in both halves); the last result."""
    held = {f"${i + 1}": value * 0x10001 for i, value in enumerate(operands)}
    for line in re.findall(r"([a-z][a-z0-9.]+ [^;]+);", asm.split(";", 1)[1]):
        name, _, rest = line.partition(" ")
        target, *given = [word.strip() for word in rest.split(",")]
        values = [held[word] if word in held else int(word, 0) for word in given]
        if name == "mov.b32":
            held[target] = values[0]
            if target == "$0":
                assert values[0] & 0xFFFF == values[0] >> 16
                return number(values[0] & 0xFFFF, dtype)
        elif name in ("shl.b32", "shr.b32"):
            moved = values[0] << values[1] if name == "shl.b32" else values[0] >> values[1]
            held[target] = moved & 0xFFFFFFFF
        elif name == "lop3.b32":
            assert values[3] == 0xEA
            held[target] = values[0] & values[1] | values[2]
        else:
            a, *others = [[number(v >> s & 0xFFFF, dtype) for s in (0, 16)] for v in values]
            assert a[0] == a[1], "both halves hold one unit"
            assert name in ("fma.rn.bf16x2", "add.f16x2")
            return a[0] * others[0][0] + others[1][0] if len(others) == 2 else a[0] + others[0][0]
    raise AssertionError(asm)


def block_of(bits: int, numbers: list[int]) -> list[int]:
    """A block's units, put together bit by bit as layout.py says."""
    width, fields = units_of(bits), 16 // bits
    direct = numbers[: width * fields]
    units = [
        sum(code << place * bits for place, code in enumerate(direct[u * fields :][:fields]))
        for u in range(width)
    ]
    stream = sum(code << i * bits for i, code in enumerate(numbers[width * fields :]))
    free = 16 % bits
    return [
        unit | (stream >> u * free & (1 << free) - 1) << 16 - free for u, unit in enumerate(units)
    ]


def python(name: str) -> Callable[..., Any]:
    from aptq.kernels.triton import fields

    found = getattr(fields, name)
    return getattr(found, "fn", found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_ptx_decodes_every_field(bits: int, spread: bool, bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float16
    asm, offset, negative, sources = map(python, ("asm", "offset", "negative", "sources"))
    assert number(negative(131, bf16), dtype) == -131
    count = block_codes(bits)
    assert [python(name)(bits) for name in ("units_of", "block_codes")] == [units_of(bits), count]
    for seed in range(4):
        every = [hash((seed, i)) % (1 << bits) if seed else (1 << bits) - 1 for i in range(count)]
        units = block_of(bits, every)
        for code, value in enumerate(every):
            first, many = sources(bits, code)
            given = units[first : first + many]
            for half in (1, 2) if bits == 8 else (0,):
                held = value if not half else value & 15 if half == 1 else value >> 4 << 4
                more = offset(bits, code, half, spread)
                what = (bits, code, half, spread, bf16)
                less = negative(more, bf16)
                assert executed(asm(*what, -1), given, dtype) == held + more
                assert executed(asm(*what, 0), [*given, less], dtype) == held
                assert executed(asm(*what, less), given, dtype) == held
                assert spread or more == offset(bits, 0, half, spread)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aptq.kernels.triton import code
for text in sys.argv[1:]:
    bits, zero, batch, warps, rank = map(int, text.split(","))
    names = ("x", "codes", "counts", "scale", "zero", "bias", "parts")
    types = ("bf16", "i16", "i32", "fp16", ("fp16", "u8", "fp16")[zero])
    names = (*names, "left", "right", "sums", "y", "flags")
    types = (*types, "bf16", "fp32", "bf16", "bf16", "fp32", "bf16", "i32")
    kinds = {name: f"*{type}" for name, type in zip(names, types, strict=True)}
    sizes = ("heads", "second", "third", "runs", "rows", "out", "columns", "padded", "per")
    fixed = dict(BITS=bits, CHUNK=32, GROUP=128, ZERO=zero,
                 BIAS=True, RANK=rank, ALL=rank, EVEN=zero == 0, BN=64, BB=batch, SPLIT=True,
                 BK=128, RUNS=8, ASM=True, WARPS=warps)
    whole = {(i,): [["tt.divisibility", 16]] for i in (*range(12), 17, 18, 19)}
    kinds |= dict.fromkeys(sizes, "i32") | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(code.multiply, kinds,
        {(len(names) + len(sizes) + i,): value for i, value in enumerate(fixed.values())}, whole)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                          options=dict(num_warps=warps, num_stages=3))
    ptx = made.asm["ptx"]
    print(text, ptx.count("wgmma.mma"), ptx.count("mma.sync"), ptx.count("cp.async.cg"))
"""


def compiled(wanted: list[str]) -> list[list[str]]:
    """Words about kernels that were compiled for an H100, in a process of its own."""
    path = os.pathsep.join(p for p in sys.path if p)
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    call = [sys.executable, "-c", COMPILE, *wanted]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_kernels_compile_for_hopper_s_matrix_units() -> None:
    few, many = compiled(["4,1,8,2,0", "4,0,64,4,0"])
    assert int(few[2]) > 0
    assert int(few[3]) > 0, "weights are not copied asynchronously"
    assert int(many[1]) > 0


@pytest.mark.slow
def test_all_kernels_compile() -> None:
    zeros = ((0, 0), (1, 32), (2, 0))
    kinds = [f"{zero},{batch},4,{rank}" for zero, rank in zeros for batch in (8, 64)]
    wanted = [f"{bits},{kind}" for bits in BITS for kind in kinds]
    assert len(compiled(wanted)) == len(wanted)


def test_settings_are_kept(tmp_path: Path) -> None:
    layout = Layout(28672, 4096, 4, 128, 64, 0)
    file, setting = tmp_path / "a" / "GPU.json", Setting(64, 8, 2, 4, 1)
    assert tuning.settings(file) == {}
    tuning.save(file, {tuning.key_of(layout, 1): setting})
    tuning.save(file, {"other": Setting(16, 8, 1, 3, 2)})
    assert tuning.settings(file)[tuning.key_of(layout, 5)] == setting
    assert len(json.loads(file.read_text())["settings"]) == 2
    assert [path.name for path in file.parent.iterdir()] == ["GPU.json"]
    assert tuning.key_of(layout, 5) != tuning.key_of(layout, 9)
    assert tuning.key_of(layout, 5) != tuning.key_of(layout._replace(zero=1), 5)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 3}',
        '{"version": 3, "settings": {"a": [64, 8, 3, 4, 1]}}',
        '{"version": 3, "settings": {"a": [64, 8, 2, 4]}}',
        '{"version": 3, "settings": {"a": [64, 8, 2, -4, 1]}}',
        '{"version": 3, "settings": {"a": ["64", 8, 2, 4, 1]}}',
    ],
)
def test_a_damaged_file_of_settings_is_not_used(text: str, tmp_path: Path) -> None:
    file = tmp_path / "GPU.json"
    file.write_text(text)
    with pytest.warns(UserWarning, match="(?s)tuned kernels were not used.*remove the file"):
        assert tuning.settings(file) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["int4-g128", "int3-g64-z", "int8-row", "int2-g32-fz"])
def test_dispatch_and_graphs(text: str) -> None:
    part = sample(text, 768, 1024)
    moved = type(part).load(
        {name: tensor.cuda() for name, tensor in part.tensors().items()}, part.meta(), part.shape
    )
    kernel = prepare(moved, torch.bfloat16)
    assert type(kernel) is Fused
    assert type(prepare(moved, torch.float32)) is Tiled
    assert type(prepare(moved, torch.bfloat16, "reference")) is Reference
    x = randn(3, 1024).bfloat16().cuda()
    wanted = kernel(x)
    assert off(wanted, x, part) < ROUNDING[torch.bfloat16]
    graph, other = torch.cuda.CUDAGraph(), randn(3, 1024, seed=5).bfloat16().cuda()
    with torch.cuda.graph(graph):
        y = kernel(x)
    second = kernel(other)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, second)
    compiled_kernel = torch.compile(kernel, fullgraph=True)
    assert torch.equal(compiled_kernel(other), second)


@pytest.mark.gpu
def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    every = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *how: every(*how)[:3])
    layout = layout_of(sample("int4-g128", 16, 1024).grid, (2048, 1024))  # type: ignore[attr-defined]
    device = torch.device("cuda", torch.cuda.current_device())
    found = tuning.tune(layout, 1, torch.bfloat16, device)
    assert len(found) >= 3
    assert list(found.values()) == sorted(found.values())
    assert 0 < min(found.values()) < 1e-3
    assert tuning.chosen(layout, 1, device) == next(iter(found))
