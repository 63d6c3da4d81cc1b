"""Run folders as files: what a report reads, made without compressing anything."""

import json
from pathlib import Path
from typing import Any

GRIDS = {"int2-g64-z": 2.28, "int3-g64-z": 3.3, "int4-g64-z": 4.3, "bf16": 16.0}
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
RECIPE = 'budget = "3.5bpw"\nseed = 7\n[[stage]]\nuse = "gptq"\n[[stage]]\nuse = "autoround"\n'
IDENTITY = {"device": "cpu", "threads": 2, "aptq": "0.1.0", "torch": "2", "transformers": "5"}


def write_run(folder: Path, *, blocks: int = 6, prefix: str = "model", role: str = "q") -> Path:
    """A run of made-up figures; `prefix` begins the names of layers, `role` is the first role."""
    folder.mkdir(parents=True, exist_ok=True)
    roles = (role, *ROLES[1:])
    names = {(b, r): f"{prefix}.layers.{b}.{r}_proj" for b in range(blocks) for r in roles}
    losses = {name: [0.3, 0.02, 0.002, 0.0] for name in names.values()}
    scores = {"measure": "fisher", "unit": "nats", "candidates": list(GRIDS), "losses": losses}
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "recipe.toml").write_text(RECIPE)
    log = [_start(prefix), *(_layer(name, b, r, roles) for (b, r), name in names.items())]
    for block in range(blocks):
        log += [
            {"event": "stage", "block": block, "stage": n, "error": 0.1 - 0.02 * n} for n in (0, 1)
        ]
        log.append({"event": "stage", "block": block, "drift": 0.01 * block})
        log.append(
            {"event": "tuned", "block": block, "stage": "autoround", "start": 0.2, "end": 0.1}
        )
        log.append({"event": "block", "block": block, "seconds": 1.5})
    points = [[2.0 + n / 2, 1000 + n, 0.5 / 2**n, 0.01] for n in range(8)]
    log.append({"event": "front", "unit": "nats per token", "points": points, "bits": GRIDS})
    phase = {"seconds": 4.0, "memory": 3 << 28}
    log.append({"event": "phases", "measure": phase, "compress 3.5bpw": phase})
    log.append({"event": "done", "seconds": 75.0, "bytes_after": 4 << 20})
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    return folder


def write_eval(folder: Path, **changes: Any) -> None:
    """What `aptq eval` leaves in a run."""
    found = {"text": "some.txt", "perplexity": 11.0, "kl": 0.25, "agreement": 0.75}
    found["reference"] = {"model": "original", "perplexity": 10.0}
    found |= {"perplexity_interval": [10.5, 11.5], "kl_interval": None}
    found["positions"] = [{"first": n, "last": n, "perplexity": 9.0, "kl": 0.5 / n} for n in (1, 2)]
    found["texts"] = [{"text": "part.txt", "perplexity": 12.0, "kl": 0.3, "agreement": 0.7}]
    task = {"task": "arc_easy", "metric": "acc", "value": 0.5, "stderr": 0.02, "items": 500}
    other = {"value": 0.55, "difference": -0.05, "stderr": 0.01, "p": 0.003, "test": "McNemar"}
    found["tasks"] = [task | {"against": other}, task | {"against": None}]
    (folder / "eval.json").write_text(json.dumps(found | changes))


def _start(prefix: str) -> dict[str, Any]:
    data = {"source": "builtin:pydoc", "samples": 8, "length": 256, "tokens_used": 2048}
    data["sha256"] = "0" * 64
    found = {"event": "start", "source": f"some/{prefix}", "model_type": "llama", "bits": 3.4999}
    found |= {"dtype": "bfloat16", "bytes_before": 16 << 20, "data": data, "python": "3.12"}
    rule = {"rule": "milp", "measure": "fisher"}
    return found | IDENTITY | {"rule": rule, "expected_loss": [0.04, 0.01]}


def _layer(name: str, block: int, role: str, roles: tuple[str, ...]) -> dict[str, Any]:
    grid = list(GRIDS)[(block + roles.index(role)) % 3]
    found = {"event": "layer", "name": name, "role": role, "grid": grid, "weights": 8000}
    found |= {"before": 16000, "after": round(1000 * GRIDS[grid]), "error": 0.01 * (1 + block)}
    return found | {"damping": 0.01, "counts": {"fallbacks": 1.0} if block == 2 else {}}
