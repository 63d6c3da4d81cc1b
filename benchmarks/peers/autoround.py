"""AutoRound (SignRound, arXiv:2309.05516) on one Hugging Face folder: the peer of uniform rows.

Runs in an environment of its own (requirements-auto-round.txt).  Not called auto_round.py: this
folder is on the import path of its scripts, and llm-compressor imports a package of that name.
Calibration: the windows that our recipes cut, given as ids, unpadded; seed 0 = the first ones.
Prints one JSON line; "oneshot" is the time of the whole call: model loading, calibration, tuning.
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
from typing import TYPE_CHECKING, Any

from llm_compressor import DATA, changed, write_dense

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("auto-round", "torch", "transformers")
SEED = 42  # AutoRound's own default, for the order in which it draws its batches


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, default=DATA / "c4_calibration.txt")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--length", type=int, default=2048, help="tokens of one window")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200, help="steps of one block")
    parser.add_argument("--batch", type=int, default=8, help="windows of one step")
    parser.add_argument("--seed", type=int, default=0, help="0 = the first windows, else random")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument(
        "--eager", action="store_true", help="no torch.compile (AutoRound's default is to compile)"
    )
    parser.add_argument(
        "--dense", type=Path, help="write the dequantised model here, as an ordinary folder"
    )
    parser.add_argument("--json", type=Path, help="write the report here too")
    return parser.parse_args()


def windows(options: argparse.Namespace) -> Tensor:
    """Ids [samples, length] of the text tokenised whole, cut as aptq.engine.data cuts them."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    stream = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    samples, length = options.samples, options.length
    if len(stream) < samples * length:
        raise SystemExit(
            f"{options.text} holds {len(stream)} tokens, {samples} x {length} are asked for"
        )
    if options.seed == 0:
        return stream[: samples * length].reshape(samples, length)
    generator = torch.Generator().manual_seed(options.seed)
    starts = torch.randint(0, len(stream) - length + 1, (samples, 1), generator=generator)
    return stream[starts + torch.arange(length)]


def quantize(options: argparse.Namespace, ids: Tensor) -> tuple[Any, dict[str, float]]:
    """The call that is timed.  The linears of its model hold dequantised values.

    Scales are fp16 and zeros integers, as AutoRound stores them by default.
    """
    import torch
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme

    start, cpu = time.perf_counter(), time.process_time()
    scheme = QuantizationScheme(
        bits=options.bits, group_size=options.group, sym=False, data_type="int", act_bits=16
    )
    tuner = AutoRound(
        str(options.model),
        scheme=scheme,
        dataset=list(ids.split(options.batch)),
        nsamples=len(ids),
        seqlen=options.length,
        batch_size=options.batch,
        iters=options.iters,
        seed=SEED + options.seed,
        device_map=options.device,
        enable_torch_compile=False if options.eager else None,
    )
    loaded = time.perf_counter()
    model, _ = tuner.quantize()
    if options.device != "cpu":
        torch.cuda.synchronize(options.device)
    end = time.perf_counter()
    seconds = {"oneshot": end - start, "load": loaded - start, "tune": end - loaded}
    return model, seconds | {"oneshot_cpu": time.process_time() - cpu}


def report(
    options: argparse.Namespace, ids: Tensor, seconds: dict[str, float], linears: int
) -> dict[str, Any]:
    import torch

    cuda = options.device != "cpu"
    return {
        "label": f"AutoRound int{options.bits} g{options.group} asym, {options.iters} iterations",
        "model": options.model.name,
        "calibration": {
            "file": options.text.name,
            "tokens": ids.numel(),
            "window": options.length,
        },
        "ids_sha256": hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest(),
        "batch": options.batch,
        "seed": options.seed,
        "eager": options.eager,
        "device": torch.cuda.get_device_name(options.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated(options.device) if cuda else 0,
        "versions": {name: version(name) for name in PACKAGES},
        "linears_changed": linears,
    }


def main() -> None:
    options = arguments()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # AutoRound looks for accelerators on import
    os.environ["HF_HUB_OFFLINE"] = "1"
    import auto_round  # noqa: F401  imported here so that the import is not part of the timed call
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {options.device}: torch sees no GPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    ids = windows(options)
    model, seconds = quantize(options, ids)
    result = report(options, ids, seconds, changed(model, options.model))
    if options.dense:
        write_dense(model, options.model, options.dense)
    line = json.dumps(result)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
