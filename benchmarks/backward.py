"""Backward walk against depth: peak memory, disk use, and gradients against automatic ones.

One random Llama with 6 and with 24 blocks of 100 MiB: one block is in memory at a time and inputs
are on disk, so the peaks should differ by less than half a block; disk use should be what
`tape_bytes` says.  Gradients are compared on a small model of the greater depth in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import memory
import random_llama
import torch

PROTOCOL = (
    "peak RssAnon of the measuring process, sampled every 5 ms, inputs of blocks on disk; "
    "allocated bytes of the tape's files, greatest of all blocks; gradient error = greatest "
    "relative difference (Frobenius) of a linear's output gradients from autograd, float32"
)
SMALL = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, help="folder for the models (4 GiB); default temporary"
    )
    parser.add_argument("--blocks", type=int, nargs=2, default=(6, 24), metavar=("FEW", "MANY"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--name", default="backward-cpu")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # model to walk over
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def walk(options: argparse.Namespace) -> None:
    """In a process of its own: walk over the model, and leave what the disk held."""
    from aptq.engine.backward import Observed, backward_walk
    from aptq.engine.tape import open_tape, tape_bytes
    from aptq.model.model import Model
    from aptq.stats.gradient import Gradient

    if options.threads:
        torch.set_num_threads(options.threads)
    model, folder, seen = Model.open(options.child), options.scratch / "tape", []
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (options.samples, options.length), generator=generator)

    def visit(block: Observed) -> None:
        block.observe((Gradient(),))
        seen.append(sum(512 * file.stat().st_blocks for file in folder.iterdir()))

    tape = open_tape(model, ids, device=torch.device("cpu"), folder=folder, where="disk")
    backward_walk(model, tape, ids, visit)
    left = sum(1 for _ in folder.iterdir())
    report = {"disk_bytes": max(seen), "files_left": left}
    report["disk_bytes_planned"] = tape_bytes(model, ids.numel())
    (options.scratch / "report.json").write_text(json.dumps(report), encoding="utf-8")


def measure(options: argparse.Namespace, blocks: int, work: Path) -> dict[str, float]:
    model = work / f"random-{blocks}"
    random_llama.write_model(model, blocks)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        words = [sys.executable, __file__, "--child", str(model), "--scratch", scratch]
        for key in ("samples", "length", "threads"):
            words += [f"--{key}", str(getattr(options, key))]
        peak, seconds = memory.watch(words)
        report = json.loads((Path(scratch) / "report.json").read_text(encoding="utf-8"))
    row = {"blocks": blocks, "peak_anonymous_bytes": peak, "seconds": round(seconds, 1)} | report
    print(
        f"{blocks} blocks: peak {peak / 2**20:.1f} MiB anonymous, disk {row['disk_bytes']:,} bytes "
        f"(planned {row['disk_bytes_planned']:,}), {seconds:.1f} s",
        flush=True,
    )
    return row


def on_gradient(linear: torch.nn.Linear, use: Callable[[torch.Tensor], None]) -> None:
    """Call `use` with the gradient of every output of `linear`."""

    def hook(_module: object, _args: object, output: torch.Tensor) -> None:
        output.register_hook(use)

    linear.register_forward_hook(hook)


def gradient_error(blocks: int, work: Path) -> dict[str, float]:
    """Greatest relative difference of any linear's output gradients from autograd's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from aptq.engine.backward import Observed, backward_walk
    from aptq.engine.tape import open_tape
    from aptq.model.model import Model
    from aptq.stats.gradient import Gradient

    torch.manual_seed(0)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**SMALL, **shape, num_hidden_layers=blocks, initializer_range=0.1)
    whole = LlamaForCausalLM(config).eval()
    whole.save_pretrained(work / "small")
    ids = torch.randint(0, 256, (4, 64))
    wanted: dict[str, torch.Tensor] = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear):
            on_gradient(module, lambda grad, name=name: wanted.update({name: grad.clone()}))
    logits = whole(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    found: dict[str, float] = {}

    def visit(block: Observed) -> None:
        for name, linear in block.linears.items():
            on_gradient(
                linear, lambda grad, name=name: found.update({name: distance(grad, wanted[name])})
            )
        block.observe((Gradient(),))

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).norm() / other.norm())

    model = Model.open(work / "small")
    tape = open_tape(model, ids, device=torch.device("cpu"), folder=work, where="disk")
    backward_walk(model, tape, ids, visit, labels="data")
    assert set(found) == set(model.shapes), sorted(set(model.shapes) - set(found))
    return {"blocks": blocks, "linears": len(found), "gradient_error": max(found.values())}


def main() -> None:
    options = arguments()
    if options.child is not None:
        walk(options)
        return
    results = common.Results.open(
        options.name, device="cpu", protocol=PROTOCOL, folder=options.results
    )
    tokens = options.samples * options.length
    row = {"label": f"{options.blocks[0]} and {options.blocks[1]} blocks, {tokens} tokens"}
    if results.find(row) is not None:
        print(f"{row['label']}: measured already in {results.path}")
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        small = gradient_error(options.blocks[1], Path(scratch))
        print(f"gradients: {small['gradient_error']:.2e} from autograd (goal <= 1e-5)", flush=True)
        work = options.work or Path(scratch)
        few, many = (measure(options, blocks, work) for blocks in options.blocks)
    block = random_llama.block_bytes()
    difference = many["peak_anonymous_bytes"] - few["peak_anonymous_bytes"]
    row |= {"block_bytes": block, "runs": [few, many], "small": small}
    row |= {"difference_blocks": round(difference / block, 4)}
    results.append(row | {"seconds": round(time.perf_counter() - began, 1)})
    print(
        f"difference {difference / 2**20:.1f} MiB = {difference / block:.3f} blocks (goal <= 0.5)"
    )


if __name__ == "__main__":
    main()
