"""llama.cpp's own quantizer on one Hugging Face folder: the peer of plans of GGUF types.

usage: python llamacpp.py MODEL --tools BUILD/bin --whole MODEL.gguf --type Q4_K_M --dense OUT
TOOLS holds llama-quantize and llama-imatrix, built from the sources in the sdist llama-cpp-python:
    cmake -S vendor/llama.cpp -B BUILD -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build BUILD --target llama-quantize llama-imatrix
A bf16 .gguf is made by llama.cpp's converter or by `aptq export`.  The importance matrix is made of
the text that our recipes calibrate on, cut to as many tokens.  Prints one JSON line with the bytes
and bits of the linears inside the blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import torch
from llm_compressor import DATA
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--whole", type=Path, required=True, help="the model as a bf16 .gguf")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--text", type=Path, default=DATA / "c4_calibration.txt")
    parser.add_argument("--tokens", type=int, default=32 * 512, help="of the text; 0 = no imatrix")
    parser.add_argument("--length", type=int, default=512, help="tokens of one window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense", type=Path, required=True, help="the dequantised folder")
    parser.add_argument("--json", type=Path, help="write the report here too")
    return parser.parse_args()


def run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stdout[-800:]}\n{done.stderr[-2000:]}")


def importance(options: argparse.Namespace, whole: Path, work: Path) -> list[object]:
    """--imatrix FILE of the first tokens of the text."""
    if not options.tokens:
        return []
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: options.tokens]
    (work / "text.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    made = work / "imatrix.gguf"
    chunks = options.tokens // options.length
    words = ["-m", whole, "-f", work / "text.txt", "-o", made, "-t", options.threads]
    run(options.tools / "llama-imatrix", *words, "-c", options.length, "--chunks", chunks)
    return ["--imatrix", made]


def sizes(file: Path) -> dict[str, Any]:
    """Bytes and bits of the linears inside the blocks, and how many tensors have which type."""
    nbytes = weights = 0
    kinds: dict[str, int] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            nbytes, weights = nbytes + tensor.n_bytes, weights + math.prod(map(int, tensor.shape))
        kind = tensor.tensor_type.name
        kinds[kind] = kinds.get(kind, 0) + 1
    return {"linear_bytes": nbytes, "bpw": 8 * nbytes / weights, "types": kinds}


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole, small = options.whole, work / "small.gguf"
        began = time.perf_counter()
        guide = importance(options, whole, work)
        run(options.tools / "llama-quantize", *guide, whole, small, options.type, options.threads)
        seconds = time.perf_counter() - began
        report = sizes(small) | {"type": options.type, "file_bytes": small.stat().st_size}
        report |= {"packed_bytes": small.stat().st_size, "seconds": {"oneshot": round(seconds, 1)}}
        tokens = {"file": options.text.name, "tokens": options.tokens, "window": options.length}
        report |= {"calibration": tokens, "peak_cuda_bytes": 0, "peak_rss_bytes": 0}
        plain = GgufConfig(gguf_file=small.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=small.name, dtype=torch.bfloat16, quantization_config=plain
        )
    if "quantization_config" in model.config.to_dict():
        del model.config.quantization_config
    model.save_pretrained(options.dense)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.dense)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
