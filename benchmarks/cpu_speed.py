"""Decoding on a CPU, end to end: packed models against bf16 and torch's int4, in turns.

usage: python cpu_speed.py SMOLLM2_FOLDER [--work DIR] [--only LABEL ...]
Goals: int4 >= 2.5 x the tokens/s of bf16, 3-bit >= 1.2 x.  A row is a model on a grid; "+head" has
the embedding and the head packed too.  Weights are rounded to nearest: only the speed is of
interest.  What bounds a token is told by `floor`: the bytes it reads at the speed at which this
machine reads a large bf16 weight, and by `profile`: where the Python process is.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import statistics
import time
from pathlib import Path
from typing import Any

import common
import ours
import random_llama
import torch

PROTOCOL = (
    "rtn checkpoints; turns of all models, order reversed in every second turn; tokens/s of greedy "
    "decoding (median step) and of a prefill, median of the turns; ratios to bf16 of the same turn"
)
GRIDS = ("int4-g64-z", "int4-g64-z+head", "int3-g64-z", "int3-g64-z+head", "int2-g64-z")
# TinyLlama-1.1B's shape
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("smollm2", type=Path, help="Hugging Face folder")
    parser.add_argument("--work", type=Path, default=Path("cpu_speed"), help="models lie here")
    parser.add_argument("--only", nargs="*", default=(), help="labels, such as llama-1b:int3-g64-z")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--batches", type=int, nargs="*", default=(1, 8, 32))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--name", default="cpu_speed-cpu", help="result file")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def write_1b(folder: Path) -> None:
    """A random Llama of 1.1e9 weights, unless it is there."""
    if (folder / "tokenizer.json").exists():
        return
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, dtype="bfloat16", bos_token_id=256, eos_token_id=257)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    random_llama.write_tokenizer(folder)


def packed(source: Path, text: str, folder: Path) -> Any:
    """`source` rounded to the grid `text`, as a checkpoint on the disk, loaded."""
    if not folder.exists():
        from aptq import pipeline
        from aptq.core.plan import Plan, Target
        from aptq.model.model import Model

        grid, _, head = text.partition("+")
        model = Model.outline(source)
        shapes = {**model.shapes, **(model.outer_shapes if head else {})}
        plan = Plan({name: Target.parse(grid) for name in shapes})
        pipeline.compress(source, folder, recipe="rtn", plan=plan, device="cpu")
    return ours.packed(folder, "cpu", torch.bfloat16, "auto")


def read_speed() -> float:
    """Bytes/s at which products with a bf16 weight that no cache holds read it."""
    weight, x = torch.zeros(32768, 8192, dtype=torch.bfloat16), torch.zeros(1, 8192).bfloat16()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return weight.nbytes / statistics.median(seconds)


def bytes_per_token(model: Any) -> int:
    """What one token reads: all that is held but the embedding's rows, unless the head is tied."""
    from aptq.evaluate.speed import resident

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    tied = tied or type(head).__name__ == "TiedHead"
    return resident(model) - (0 if tied else resident(embedding))


def profile(model: Any, load: Any) -> list[dict[str, Any]]:
    """Where decoding at batch 1 spends its time; the profiler slows Python, not the products."""
    from aptq.evaluate.speed import decode

    profiler = cProfile.Profile()
    with profiler:
        decode(model, 1, load)
    return ours.profile_rows(profiler, 15)


def measure(name: str, source: Path, text: str, options: argparse.Namespace) -> common.Row:
    from aptq.evaluate.speed import Load, compare, resident, with_torch_int4

    load = Load(
        batches=tuple(options.batches),
        prompt=options.prompt,
        tokens=options.tokens,
        turns=options.turns,
    )
    models = {"bf16": ours.dense(source, "cpu")}
    models["packed"] = packed(source, text, options.work / f"{name}-{text}")
    if text == "int4-g64-z":
        models["torch int4"] = copy.deepcopy(models["bf16"])
        with_torch_int4(models["torch int4"])
    rows = [row.to_json() for row in compare(models, "bf16", load)]
    for row in rows:
        what = f"{name} {text} {row['case']} {row['batch']}: {row['model']}"
        print(f"{what} {row['rate']:.2f} tokens/s, {row['ratio']:.2f} x", flush=True)
    speed = read_speed()
    read = {key: bytes_per_token(model) for key, model in models.items()}
    step = {r["model"]: 1 / r["rate"] for r in rows if (r["case"], r["batch"]) == ("decode", 1)}
    return {
        "threads": torch.get_num_threads(),
        "resident_bytes": {key: resident(model) for key, model in models.items()},
        "bytes_per_token": read,
        "read_bytes_per_second": round(speed),
        # share of a token's time in which the memory would do its part
        "floor": {key: round(read[key] / speed / step[key], 4) for key in step},
        "speeds": rows,
        "profile": profile(models["packed"], load),
    }


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = common.Results.open(
        options.name, device="cpu", protocol=PROTOCOL, folder=options.results
    )
    options.work.mkdir(parents=True, exist_ok=True)
    sources = {"smollm2": options.smollm2, "llama-1b": options.work / "llama-1b"}
    for name, source in sources.items():
        for text in GRIDS:
            label = f"{name}:{text}"
            if options.only and label not in options.only:
                continue
            if name == "llama-1b":
                write_1b(source)
            row: common.Row = {"label": label, "model_sha256": common.sha256_model(source)}
            if results.find(row):
                print(f"{label}: already in {results.path.name}")
                continue
            results.append(row | measure(name, source, text, options))


if __name__ == "__main__":
    main()
