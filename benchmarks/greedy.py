"""Packed model against its dequantised twin: greedy tokens, NLL of fast kernels, resident bytes.

usage: python greedy.py MODEL RUN_FOLDER
Goals: identical tokens with the float32 reference kernel, mean NLL within 0.2 % with fast kernels,
bytes of all distinct tensor storages within 10 % of the checkpoint's weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import ours
import torch

PROTOCOL = (
    "20 prompts x 64 greedy tokens, float32 reference kernel against dense; mean NLL over 4,096 "
    "tokens (2 windows of 2048) in bf16, fast kernels against dense; bytes of distinct tensor "
    "storages against bytes of the checkpoint's safetensors"
)
NEW_TOKENS = 64
WINDOW, WINDOWS = 2048, 2
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "In 1969, two astronauts walked on",
    "def fibonacci(n):\n",
    "The quick brown fox jumps over",
    "Once upon a time, in a small village by the sea,",
    "List three reasons to learn a second language:\n1.",
    "The theory of evolution by natural selection says that",
    "Dear Sir or Madam,\nI am writing to",
    "Q: What is the largest planet of the solar system?\nA:",
    "To make bread you need flour, water, salt and",
    "The stock market fell sharply on Monday because",
    "Translate to Spanish: Good morning, my friend.\n",
    "import numpy as np\n\ndef mean(values):\n",
    "A photon is a particle of",
    "The president of the committee announced on Friday that",
    "Roses are red, violets are",
    "The derivative of x squared with respect to x is",
    "She opened the door slowly and saw",
    "Photosynthesis is the process by which plants",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of the source (tokenizer)")
    parser.add_argument("run", type=Path, help="run folder with checkpoint/")
    parser.add_argument("--label", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=common.SHARED)
    parser.add_argument("--name", help="result file; default greedy-DEVICE")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]], device: str) -> list[list[int]]:
    """The greedy continuation of each prompt, NEW_TOKENS long (an end token does not stop it)."""
    found = []
    for ids in prompts:
        row = torch.tensor([ids], device=device)
        out = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(out[0, len(ids) :].tolist())
    return found


def compare_greedy(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    device = options.device
    dense = generate(ours.dense(options.run, device, torch.float32), prompts, device)
    mine = generate(ours.packed(options.run, device, torch.float32, "reference"), prompts, device)
    same = [a == b for a, b in zip(mine, dense, strict=True)]
    equal = sum(x == y for a, b in zip(mine, dense, strict=True) for x, y in zip(a, b, strict=True))
    print(
        f"greedy: {sum(same)} of {len(same)} prompts identical ({equal} tokens equal)", flush=True
    )
    return {"prompts": len(same), "prompts_identical": sum(same), "tokens_equal": equal}


def storage_bytes(model: torch.nn.Module) -> int:
    """Bytes of all distinct storages that parameters and buffers hold: tied tensors count once."""
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


def compare_fast(options: argparse.Namespace) -> dict[str, Any]:
    """NLL of fast kernels and dense model in bf16, and what the packed model keeps in memory."""
    text = options.shared / "data" / "wikitext2_test.txt"
    ids = ours.tokens(options.model, text)[: WINDOW * WINDOWS]
    device = options.device
    dense = ours.perplexity(ours.dense(options.run, device), ids, device, window=WINDOW)
    model = ours.packed(options.run, device, torch.bfloat16, "auto")
    fast = ours.perplexity(model, ids, device, window=WINDOW)  # first use may repack the weights
    files = (options.run / "checkpoint").glob("*.safetensors")
    disk, held = sum(file.stat().st_size for file in files), storage_bytes(model)
    difference = fast.nll / dense.nll - 1
    print(f"NLL: fast {fast.nll:.6f}, dense {dense.nll:.6f}: {difference:+.4%} (goal 0.2 %)")
    print(f"resident {held} bytes, on disk {disk}: {held / disk - 1:+.2%} (goal 10 %)", flush=True)
    found = {"nll_fast": fast.nll, "nll_dense": dense.nll, "nll_difference": difference}
    return found | {"resident_bytes": held, "disk_bytes": disk, "resident_ratio": held / disk}


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.name or f"greedy-{options.device.split(':')[0]}"
    results = common.Results.open(
        name, device=options.device, protocol=PROTOCOL, folder=options.results
    )
    digest = common.sha256_model(options.run / "checkpoint")
    row: common.Row = {"model_sha256": digest, "label": options.label or options.run.name}
    if results.find(row):
        print(f"{row['label']}: already in {results.path.name}")
        return
    results.append(row | compare_greedy(options) | compare_fast(options))


if __name__ == "__main__":
    main()
