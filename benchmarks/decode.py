"""Decoding with a Llama-3-8B-shaped model of random weights: bf16 beside a mixed 3.5-bit plan.

Weights never leave the device: no checkpoint and no compression, only speed and memory.  Both
models decode through one CUDA graph a token, plainly and with the rest of the step compiled by
torch; every pair is measured in one process.  Packed layers that read the same input run as one
product; --apart measures them one by one.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import common
import torch
from torch import nn

# Llama 3 8B
MODEL = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
MODEL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
LOW, HIGH = "int3-g128", "int4-g128"
SIBLINGS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "glu", "up_proj": "glu"}
PROTOCOL = (
    "random weights, prompt of 64 tokens, then --tokens tokens a sequence through a CUDA graph, "
    "greedy; seconds between device synchronisations, best of 3; memory = allocated after loading; "
    "linears of the blocks are packed, the embedding stays bf16, the head unless named; q, k "
    "and v have the same grid, gate and up too, and run stacked unless the label says apart"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--bits", type=float, default=3.5, help="bits a weight, scales included")
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[0], help="of factors beside the packed codes"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plain", action="store_true", help="leave out the compiled rows")
    parser.add_argument(
        "--apart", action="store_true", help="a product for each layer, packed ones not stacked"
    )
    parser.add_argument("--head", default="", help="grid of the head, which stays bf16 without")
    parser.add_argument("--only", default="", help="rows whose label holds this text")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--name", default="decode-cuda")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def random_model(options: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(MODEL)
    if options.small:
        shape |= {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 512}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=options.blocks, tie_word_embeddings=False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def random_part(text: str, shape: tuple[int, int], device: str) -> object:
    from aptq.core.bits import packed_size
    from aptq.core.grid import Grid
    from aptq.core.parts import Quantized

    grid = Grid.parse(text)
    size = (shape[0], packed_size(shape[1], grid.bits))
    codes = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    groups = (shape[0], grid.groups(shape[1]))
    # the standard deviation of evenly drawn levels times the scale is that of the dense weights
    scale = torch.full(groups, 0.02 * 12**0.5 / grid.levels, dtype=torch.float16, device=device)
    return Quantized(codes, scale, None, grid, shape)


def random_factors(rank: int, shape: tuple[int, int], device: str) -> object:
    from aptq.core.parts import Dense, LowRank

    sides = [(rank, size) for size in shape]
    made = [0.01 * torch.randn(side, device=device).bfloat16() for side in sides]
    return LowRank(*(Dense(side) for side in made))


def pack(model: nn.Module, bits: float, rank: int, head: str = "") -> float:
    """Replace the blocks' linears; bits a weight of the codes, the closest to `bits`.

    Layers with the same input get the same grid, as engines ask that join them, vLLM among them.
    """
    from aptq.core.grid import Grid
    from aptq.runtime.linear import PackedLinear

    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    nbytes = weights = 0
    text, last = HIGH, ""
    for path, linear in linears:
        shape = tuple(linear.weight.shape)
        parent, _, name = path.rpartition(".")
        group = f"{parent}.{SIBLINGS.get(name, name)}"
        if group != last:
            text, last = LOW if 8 * nbytes >= bits * weights else HIGH, group
        nbytes += Grid.parse(text).nbytes(shape)
        weights += shape[0] * shape[1]
        parts = [random_part(text, shape, linear.weight.device)]
        if rank:
            parts.append(random_factors(rank, shape, linear.weight.device))
        packed = PackedLinear(parts)
        packed.prepare(torch.bfloat16)
        model.set_submodule(path, packed)
    if head:
        shape, device = tuple(model.lm_head.weight.shape), model.lm_head.weight.device
        model.lm_head = PackedLinear([random_part(head, shape, device)])
        model.lm_head.prepare(torch.bfloat16)
    return 8 * nbytes / weights


@torch.inference_mode()
def tokens_per_second(
    model: nn.Module, batch: int, count: int, device: str, compiled: bool, apart: bool
) -> float:
    from aptq.runtime.graph import Static

    ids = torch.randint(0, 256, (batch, 64), device=device)

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    forward = Static(model, batch, 64 + 4 + 3 * count, compiled=compiled, apart=apart)
    token = forward(ids).argmax(-1, keepdim=True)
    for _ in range(4):  # kernels, then the graph
        token = forward(token).argmax(-1, keepdim=True)
    assert forward.graph is not None or device == "cpu", "no graph was captured"
    best = float("inf")
    for _ in range(3):
        synchronize()
        began = time.perf_counter()
        for _ in range(count):
            token = forward(token).argmax(-1, keepdim=True)
        synchronize()
        best = min(best, time.perf_counter() - began)
    return batch * count / best


def measure(
    options: argparse.Namespace, results: common.Results, bits: float, rank: int = 0
) -> None:
    wanted = []
    for compiled in (False, True)[: 1 if options.plain else 2]:
        for batch in options.batch:
            kind = f"{bits:.2f} bits" if bits < 16 else "bf16"
            kind += f" + rank {rank}" if rank else ""
            kind += f", head {options.head}" if options.head and bits < 16 else ""
            place = f"{options.blocks} blocks, batch {batch}, {('plain', 'compiled')[compiled]}"
            label = f"{kind}, {place}" + (", apart" if options.apart and bits < 16 else "")
            if options.only in label and results.find({"label": label}) is None:
                wanted.append((label, place, batch, compiled))
    if not wanted:
        return
    model = random_model(options)
    built = pack(model, bits, rank, options.head) if bits < 16 else 16.0
    gc.collect()
    held = None
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
        held = round(torch.cuda.memory_allocated() / 2**30, 3)
    for label, place, batch, compiled in wanted:
        speed = tokens_per_second(
            model, batch, options.tokens, options.device, compiled, options.apart
        )
        row: common.Row = {"label": label, "bpw": round(built, 4), "memory_gib": held}
        row |= {"tokens_per_second": round(speed, 2), "milliseconds": round(1e3 * batch / speed, 4)}
        base = results.find({"label": f"bf16, {place}"})
        row["ratio_to_bf16"] = round(speed / base["tokens_per_second"], 3) if base else None
        results.append(row)
        print(row, flush=True)


def main() -> None:
    options = arguments()
    results = common.Results.open(
        options.name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    measure(options, results, 16.0)
    for rank in options.ranks:
        gc.collect()
        measure(options, results, options.bits, rank)


if __name__ == "__main__":
    main()
