"""The one place where benchmarks touch the package: recipes, compression, models, perplexity.

Also a program, so that a compression can be timed as a process of its own: `python ours.py MODEL
OUT --recipe ...` prints one JSON line with the seconds of the whole call and the process's peak.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import json
import math
import pstats
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import torch

TEXTS = {
    "test": {"wikitext2": "wikitext2_test.txt", "c4": "c4_eval.txt"},
    "validation": {"wiki_validation": "wiki_validation.txt", "c4_validation": "c4_validation.txt"},
}


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that decide a compression, the same for every benchmark."""
    parser.add_argument("--recipe", default="aptq", help="shipped name or .toml file")
    parser.add_argument("--grid", help="the same for all layers; default int4-g64-z, or --budget")
    parser.add_argument("--budget", help="let the recipe choose grids layer by layer")
    parser.add_argument("--scores", type=Path, help="scores.json of a measuring pass before")
    parser.add_argument(
        "--text", type=Path, help="calibration text; default: C4 of the data folder"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of one window")
    parser.add_argument(
        "--seed", type=int, default=0, help="0 = the first windows, else random ones"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own choice")
    parser.add_argument("--shared", type=Path, default=common.SHARED, help="folder with data/")


def recipe_of(options: argparse.Namespace) -> Any:
    """The recipe with the protocol's calibration, then every --set, such as `stage.0.damp=0.02`."""
    from aptq.recipe import Recipe

    table = tomllib.loads(Recipe.load(options.recipe).text())
    text = options.text or options.shared / "data" / "c4_calibration.txt"
    if options.budget:
        table |= {"budget": options.budget}
    else:
        table |= {"grids": [options.grid or "int4-g64-z"], "budget": ""}
    table |= {"seed": options.seed}
    table["data"] |= {"source": str(text), "samples": options.samples, "length": options.length}
    table["data"]["seed"] = options.seed
    for change in options.changes:
        key, _, value = change.partition("=")
        if key == "measure.use":
            table["measure"] = {}  # the options of another measure are not this one's
        set_key(table, key.split("."), toml_value(value))
    import tomli_w

    return Recipe.parse(tomli_w.dumps(table), options.recipe)


def set_key(table: Any, path: list[str], value: Any) -> None:
    """Set a nested key; a number steps into a list: `stage.0.damp`."""
    for step in path[:-1]:
        table = table[int(step)] if isinstance(table, list) else table.setdefault(step, {})
    table[path[-1]] = value


def toml_value(text: str) -> Any:
    """`text` as a TOML value; bare words are strings."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def sha256_recipe(recipe: Any) -> str:
    """Digest of the whole recipe; its text by file name, so that machines agree."""
    table = tomllib.loads(recipe.text())
    table["data"]["source"] = Path(table["data"]["source"]).name
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def calibration_of(recipe: Any) -> dict[str, Any] | None:
    """What the recipe's stages read; None where they need no data."""
    if not any(stage.reads for stage in recipe.stages):
        return None
    data = recipe.data
    found = {"file": Path(data.source).name, "tokens": data.needed, "window": data.length}
    # tokens that the model writes itself come on top; a key only where there are any
    return found | ({"written": data.total - data.needed} if data.written else {})


def tuned_of(run: Path) -> dict[str, dict[str, Any]]:
    """What the tuning stages of a run folder logged: stage -> counts and mean losses of blocks.

    start and end are losses on held-out windows, first and last on those that were trained on; a
    stage for the whole model counts as one block.  None where no loss was finite.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (run / "log.jsonl").read_text("utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "tuned" and "start" in event:
            found.setdefault(event["stage"], []).append(event)

    def mean(values: list[float]) -> float | None:
        known = [value for value in values if math.isfinite(value)]
        return float(f"{sum(known) / len(known):.6g}") if known else None

    return {
        stage: {"blocks": len(rows), "worse": sum(row["end"] > row["start"] for row in rows)}
        | {key: sum(row[key] for row in rows) for key in ("kept", "restarts")}
        | {key: mean([row[key] for row in rows]) for key in ("start", "end", "first", "last")}
        for stage, rows in found.items()
    }


def compress(
    model: Path,
    out: Path,
    recipe: Any,
    device: str,
    activations: str = "auto",
    scores: Path | None = None,
) -> dict[str, Any]:
    """Compress `model` into run folder `out`; seconds of the whole call, bytes written.

    activations: "disk" puts the hidden states there even where memory would do; scores: a file
    that replaces the recipe's measuring pass, whose time is then not counted.
    """
    from aptq import pipeline
    from aptq.core.scores import Scores

    known = None if scores is None else Scores.load(scores)
    start, cpu = time.perf_counter(), time.process_time()
    done = pipeline.compress(
        model, out, recipe=recipe, device=device, activations=activations, scores=known
    )
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "bpw": done.bits,
        "linear_bytes": sum(row.after for row in done.rows),
        "checkpoint_bytes": done.bytes_after,
        "fallbacks": done.fallbacks,
    }


def dense(folder: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """An ordinary model: a run folder's dequantised one, or any Hugging Face folder."""
    if (folder / "checkpoint").is_dir():
        from aptq.runtime.load import dense as load_dense

        return load_dense(folder, dtype=dtype).to(device).eval()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def packed(folder: Path, device: str, dtype: torch.dtype, kernel: str) -> Any:
    from aptq.runtime.load import load

    return load(folder, device=device, dtype=dtype, kernel=kernel)


def tokens(model: Path, text: Path) -> torch.Tensor:
    """The whole text as one row of ids [tokens], no special tokens added."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    return torch.tensor(ids["input_ids"], dtype=torch.int64)


def perplexity(model: Any, ids: torch.Tensor, device: str, *, window: int = 2048) -> Any:
    from aptq.evaluate.perplexity import perplexity as measure

    return measure(model, ids, window=window, device=device)


def profile_rows(profile: cProfile.Profile, count: int = 40) -> list[dict[str, Any]]:
    """The functions with most time of their own, and all of the package by cumulative time."""
    rows = []
    for (file, line, name), (_, calls, own, total, _) in pstats.Stats(profile).stats.items():
        inside = "/aptq/" in file
        where = f"aptq/{file.rsplit('/aptq/', 1)[1]}:{line}" if inside else Path(file).name
        rows.append({"where": where, "name": name, "calls": calls, "own": own, "total": total})
    rows.sort(key=lambda row: -row["own"])
    top = rows[:count]
    package = sorted((r for r in rows if r["where"].startswith("aptq/")), key=lambda r: -r["total"])
    chosen = top + [row for row in package[:count] if row not in top]
    return [row | {"own": round(row["own"], 3), "total": round(row["total"], 3)} for row in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--activations", choices=("auto", "memory", "disk"), default="auto")
    parser.add_argument(
        "--profile", action="store_true", help="add where the time goes to the report"
    )
    add_recipe_arguments(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = recipe_of(options)
    profile = cProfile.Profile() if options.profile else None
    with profile or nullcontext():
        done = compress(options.model, options.out, recipe, options.device, options.activations)
    done |= {"peak_bytes": common.peak_bytes(options.device), "threads": torch.get_num_threads()}
    done |= {"calibration": calibration_of(recipe), "recipe_sha256": sha256_recipe(recipe)}
    if profile:
        done["profile"] = profile_rows(profile)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
