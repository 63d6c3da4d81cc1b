"""llm-compressor's GPTQ on one Hugging Face folder: the peer of every uniform row.

Runs in an environment of its own (requirements-llm-compressor.txt) and imports nothing from here.
Calibration: the first windows of a text tokenised whole, no special tokens, given as ids, unpadded.
Prints one JSON line; seconds are of the whole `oneshot` call, model loading included, saving apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, default=DATA / "c4_calibration.txt")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of one window")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument(
        "--dense", type=Path, help="write the dequantised model here, as an ordinary folder"
    )
    parser.add_argument(
        "--packed", type=Path, help="write the compressed-tensors checkpoint here (timed apart)"
    )
    parser.add_argument("--json", type=Path, help="write the report here too")
    return parser.parse_args()


def windows(model: Path, text: Path, samples: int, length: int) -> list[list[int]]:
    """The first `samples` windows of `length` tokens of the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    if len(ids) < samples * length:
        raise SystemExit(f"{text} holds {len(ids)} tokens, {samples} x {length} are asked for")
    return [ids[i * length : (i + 1) * length] for i in range(samples)]


def quantize(options: argparse.Namespace, ids: list[list[int]]) -> Any:
    """The call that is timed: load, calibrate, quantize.  Its weights are dequantised values."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": options.symmetric,
        "strategy": "group",
    }
    weights |= {"group_size": options.group, "actorder": "static"}
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        dampening_frac=options.damp,
    )
    dataset = Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    )
    return oneshot(
        model=str(options.model),
        dataset=dataset,
        recipe=modifier,
        max_seq_length=options.length,
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )


def write_dense(model: Any, source: Path, out: Path) -> None:
    """Put the quantized values into a fresh copy of the source, for any evaluator."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype)
    values, wanted = model.state_dict(), plain.state_dict()
    missing = sorted(wanted.keys() - values.keys())
    assert not missing, missing
    plain.load_state_dict({name: values[name] for name in wanted})
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def changed(model: Any, source: Path) -> int:
    """Count the linears whose weights differ from the source: something was quantized."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype)
    values = model.state_dict()
    linears = [
        name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    old = plain.state_dict()
    return sum(not torch.equal(old[f"{n}.weight"], values[f"{n}.weight"].cpu()) for n in linears)


def report(
    options: argparse.Namespace, ids: list[list[int]], seconds: dict[str, float]
) -> dict[str, Any]:
    import torch

    kind = "sym" if options.symmetric else "asym"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return {
        "label": f"llm-compressor GPTQ int{options.bits} g{options.group} {kind}",
        "model": options.model.name,
        "calibration": {
            "file": options.text.name,
            "tokens": sum(map(len, ids)),
            "window": options.length,
        },
        "ids_sha256": digest,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_rss_bytes": peak,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else 0,
        "versions": {name: version(name) for name in PACKAGES},
    }


def main() -> None:
    options = arguments()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # oneshot takes an accelerator whenever it sees one
    os.environ["HF_HUB_OFFLINE"] = "1"
    import llmcompressor  # noqa: F401  imported here so that the import is not part of the timed call
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    ids = windows(options.model, options.text, options.samples, options.length)
    seconds = {}
    start, cpu = time.perf_counter(), time.process_time()
    model = quantize(options, ids)
    if options.device == "cuda":
        torch.cuda.synchronize()
    seconds["oneshot"] = time.perf_counter() - start
    seconds["oneshot_cpu"] = time.process_time() - cpu
    result = report(options, ids, seconds)  # before anything below adds to the peak
    result["linears_changed"] = changed(model, options.model)
    if options.dense:
        write_dense(model, options.model, options.dense)
    if options.packed:
        start = time.perf_counter()
        model.save_pretrained(options.packed, save_compressed=True)
        result["seconds"]["save"] = round(time.perf_counter() - start, 3)
        result["packed_bytes"] = sum(f.stat().st_size for f in options.packed.iterdir())
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.packed)
    line = json.dumps(result)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
