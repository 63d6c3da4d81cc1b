"""Does a model planned for "fits X @ 8192x1" run in X?  Predicted and real peak on a CUDA device.

A random model of the shape of Llama-3.2-1B is compressed by rtn once for each X and generates at
full context while the process may take no more than X from the GPU.  The peak is what torch has
allocated; the CUDA context comes on top.  About a minute on an H100.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the CLI does

import common
import random_llama
import torch

PROTOCOL = (
    "peak of torch.cuda.max_memory_allocated while transformers' generate reads all but the last "
    "tokens of the context at once and writes these, under set_per_process_memory_fraction"
)
GOAL = 0.05  # of the prediction
WRITTEN = 8  # tokens that are generated; the rest of the context is the prompt


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1760MiB", "2GiB", "2.5GiB"], metavar="X")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for the model (6 GiB); default temporary")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default="fits-cuda")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def write_model(folder: Path, context: int, device: str) -> None:
    """1.24 billion random weights, with the embedding tied to the head."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if (folder / "config.json").exists():
        return
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    random_llama.write_tokenizer(folder)
    model.save_pretrained(folder)


def free(device: str) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def generate(folder: Path, context: int, batch: int, device: str, limit: int) -> tuple[int, int]:
    """Peak bytes (allocated, reserved) of loading the run and generating at full context.

    The process may reserve at most `limit` bytes.
    """
    from aptq.runtime.load import load

    free(device)
    index = torch.cuda.current_device()  # the call wants a number, "cuda" is refused
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total, index)
    model = load(folder, device=device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (batch, context - WRITTEN), generator=generator).to(device)
    mask = torch.ones_like(ids)
    done = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=WRITTEN,
        max_new_tokens=WRITTEN,
        pad_token_id=257,
    )
    assert done.shape == (batch, context), tuple(done.shape)
    peak = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    del model, done, ids, mask
    torch.cuda.set_per_process_memory_fraction(1.0, index)
    free(device)
    return peak


def measure(options: argparse.Namespace, size: str, model: Path, out: Path) -> dict[str, Any]:
    from aptq.core.budget import Budget
    from aptq.core.plan import Plan
    from aptq.footprint import running
    from aptq.model.model import Model
    from aptq.pipeline import compress
    from aptq.recipe import Recipe

    start = time.perf_counter()
    budget = f"fits {size} @ {options.context}x{options.batch}"
    recipe = Recipe.load("rtn").adapt(budget=budget)
    done = compress(model, out, recipe=recipe, device=options.device)
    compressed = time.perf_counter() - start
    plan = Plan.load(out / "plan.json")
    predicted = running(Model.open(model), plan, options.context, options.batch)
    print(f"{size}: predicted {predicted}", flush=True)  # also where generating fails
    limit = Budget.parse(budget).device_bytes
    assert limit is not None
    shape = (options.context, options.batch)
    peak, reserved = generate(out, *shape, options.device, limit)
    return {
        "label": budget,
        "grid": plan.made_by.get("grid"),
        "bpw": done.bits,
        "limit_bytes": limit,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "predicted_bytes": predicted.peak,
        "predicted": {
            "weights": predicted.weights,
            "cache": predicted.cache,
            "work": predicted.work,
        },
        "ratio": round(peak / predicted.peak, 4),
        "holds": peak <= limit and abs(peak / predicted.peak - 1) <= GOAL,
        "seconds": [round(compressed, 1), round(time.perf_counter() - start - compressed, 1)],
    }


def main() -> None:
    options = arguments()
    results = common.Results.open(
        options.name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = (options.work or Path(scratch)) / "random-1b"
        for number, size in enumerate(options.sizes):
            label = f"fits {size} @ {options.context}x{options.batch}"
            if results.find({"label": label}):
                continue
            write_model(model, options.context, options.device)
            row = measure(options, size, model, Path(scratch) / f"run-{number}")
            results.append(row)
            print(
                f"{label}: {row['grid']}, peak {row['peak_bytes'] / 2**20:.1f} MiB, predicted "
                f"{row['predicted_bytes'] / 2**20:.1f} MiB, ratio {row['ratio']} "
                f"(goal 1 +- {GOAL}), {row['seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
