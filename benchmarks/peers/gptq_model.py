"""GPTQModel's GPTQ on one Hugging Face folder: a checkpoint to set beside ours.

usage: python gptq_model.py MODEL --packed OUT
Runs in an environment of its own (requirements-gptq-model.txt).  Not called gptqmodel.py: this
folder is on the import path of its scripts.  Calibration: the first windows of a text tokenised
whole, no special tokens, given as ids, unpadded.  Prints one JSON line; seconds are of loading
and quantizing, saving apart.
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

from llm_compressor import DATA, windows

PACKAGES = ("gptqmodel", "torch", "transformers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, default=DATA / "c4_calibration.txt")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of one window")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true", help="its default is symmetric")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--packed", type=Path, required=True, help="write the checkpoint here")
    parser.add_argument("--json", type=Path, help="write the report here too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 fails on two cores without it
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import GPTQConfig

    if options.threads:
        torch.set_num_threads(options.threads)
    ids = windows(options.model, options.text, options.samples, options.length)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    config = GPTQConfig(
        bits=options.bits,
        group_size=options.group,
        sym=not options.asymmetric,
        device=options.device,
    )
    start = time.perf_counter()
    model = GPTQModel.load(str(options.model), config)
    model.quantize(rows, batch_size=1, calibration_sort=None)
    seconds = {"oneshot": round(time.perf_counter() - start, 3)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    model.save(str(options.packed))
    seconds["save"] = round(time.perf_counter() - start, 3)
    kind = "asym" if options.asymmetric else "sym"
    report = {
        "label": f"GPTQModel GPTQ int{options.bits} g{options.group} {kind}",
        "model": options.model.name,
        "calibration": {
            "file": options.text.name,
            "tokens": options.samples * options.length,
            "window": options.length,
        },
        "ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else 0,
        "packed_bytes": sum(f.stat().st_size for f in options.packed.iterdir() if f.is_file()),
        "versions": {name: version(name) for name in PACKAGES},
    }
    line = json.dumps(report)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
