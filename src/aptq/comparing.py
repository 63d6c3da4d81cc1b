"""Several models side by side: size, perplexity, divergence, tasks and speed on the same items."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFReader

from aptq.assessing import Exam, examine
from aptq.evaluate.speed import Load, decode
from aptq.model.model import Model
from aptq.model.weights import Shards
from aptq.report.markup import plotly
from aptq.runtime.open import compressed_folder, find_device, open_any
from aptq.store.checkpoint import Checkpoint
from aptq.work import Report, Step, silent

# files of a Hugging Face folder that running the model needs; others are copies in other formats
NEEDED = (".safetensors", ".json", ".jinja", ".txt", ".model")
TURNS = 3  # of decoding: the first one warms up, and the median leaves it out


class Size(NamedTuple):
    """What a model takes on disk.

    bits: of everything stored for the matrices inside the blocks, per weight.
    """

    format: str
    nbytes: int
    bits: float


@dataclass(frozen=True)
class Compared:
    """The models in the order given, each with size and figures as plain values.

    `base`: the model that differences are from; it is the reference, or the first one.
    """

    text: str
    window: int
    base: str
    models: tuple[dict[str, Any], ...]

    @property
    def measure(self) -> str:
        """What the picture shows: KL where there is a reference, else perplexity."""
        return "kl" if any(one["kl"] is not None for one in self.models) else "perplexity"

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain values."""
        head = {"text": self.text, "window": self.window, "base": self.base}
        return {**head, "models": list(self.models), "front": self.front()}

    def front(self) -> list[str]:
        """Models for which no other one is both smaller and better, the smallest first."""
        key = self.measure
        known = [one for one in self.models if one[key] is not None]
        best: list[dict[str, Any]] = []
        for one in sorted(known, key=lambda one: (one["bytes"], one[key])):
            if not best or one[key] < best[-1][key]:
                best.append(one)
        return [one["model"] for one in best]


def compare(
    sources: Sequence[str | Path],
    exam: Exam,
    *,
    reference: str | Path | None = None,
    device: str = "auto",
    report: Report = silent,
) -> Compared:
    """Ask every model of `sources` the same, and set them beside each other.

    Takes run folders, Hugging Face folders (GPTQ and compressed-tensors too) and .gguf files; what
    other tools packed is decoded and runs as an ordinary model.  Decoding speeds are taken one
    after the other, whatever else the machine does; `aptq bench run` takes turns.  With a
    `reference` every model's divergence from it is taken, with both in memory.  Raises ValueError
    where a model cannot be read or has another tokenizer than the first.
    """
    names = [str(one) for one in sources]
    sizes = [size_of(one) for one in sources]
    on = find_device(device)
    original = None if reference is None else open_any(reference, on)
    base = None if original is None else examine(original, exam, report=report)
    same = None if original is None else exam.ids(original)
    models = []
    for name, size in zip(names, sizes, strict=True):
        report(Step(f"load {Path(name).name}", 0, 1))
        ready = open_any(name, on)
        report(Step(f"load {Path(name).name}", 1, 1))
        ids = exam.ids(ready)
        same = same or ids
        if any(not ids[text].equal(same[text]) for text in ids):
            raise ValueError(
                "the models have different tokenizers, their figures do not compare\n"
                f"{name}: other tokens for {exam.name} than {reference or names[0]}\n"
                "compare models that come from one original"
            )
        found = examine(ready, exam, reference=original, report=report)
        base = base or found
        row = {"model": name, "format": size.format, "bytes": size.nbytes, "bpw": size.bits}
        row["decode"] = statistics.median(decode(ready.model, 1, Load()) for _ in range(TURNS))
        models.append({**row, **found.to_json(None if found is base else base, exam.seed)})
        del ready  # before the next one comes into memory
    return Compared(exam.name, exam.window, str(reference or names[0]), tuple(models))


def size_of(source: str | Path) -> Size:
    """Bytes and bits of a model on disk, from headers alone.  Raises ValueError."""
    path = Path(source).expanduser()
    checkpoint = compressed_folder(path)
    if checkpoint is not None:
        opened = Checkpoint.open(checkpoint)
        itemsize = 4 if opened.manifest.dtype == "float32" else 2
        bits = opened.plan.bits(opened.manifest.shapes, itemsize)
        return Size("aptq", opened.nbytes, bits)
    if not path.exists():
        raise ValueError(
            f"there is no model to compare\n{path}: no such file or folder\n"
            "give run folders, Hugging Face folders or .gguf files on this machine"
        )
    model = Model.open(path)
    if path.is_file():
        matrices = [
            t for t in GGUFReader(path).tensors if t.name[:4] == "blk." and len(t.shape) > 1
        ]
        stored = sum(int(t.n_bytes) for t in matrices)
        weights = sum(int(t.n_elements) for t in matrices)
        return Size("gguf", path.stat().st_size, 8 * stored / weights)
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.suffix in NEEDED)
    raw = json.loads((path / "config.json").read_text("utf-8"))
    name = raw.get("quantization_config", {}).get("quant_method", str(model.dtype)[6:])
    weights = sum(rows * columns for rows, columns in model.shapes.values())
    return Size(name, nbytes, 8 * _stored(Shards(path)) / weights)


def _stored(shards: Shards) -> int:
    """Bytes stored for the matrices inside the blocks: codes, scales, zeros, orders; no biases."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in shards.shapes:
        if re.search(r"(?:^|\.)\d+\.", name):
            layers[name.rpartition(".")[0]].append(name)
    return sum(
        shards.read(name).nbytes  # mapped, not read
        for names in layers.values()
        if any(len(shards.shapes[name]) > 1 for name in names)  # norms hold vectors only
        for name in names
        if not name.endswith(".bias")
    )


def write_html(path: Path, found: Mapping[str, Any], measure: str) -> None:
    """Write the picture of `found` (Compared.to_json()), size against `measure`, as one file.

    Raises ValueError where Plotly is not installed.
    """
    models = sorted(
        (one for one in found["models"] if one[measure] is not None), key=lambda one: one["bytes"]
    )
    ends = [one[f"{measure}_interval"] or [one[measure]] * 2 for one in models]
    xs, ys = [one["bytes"] / 2**20 for one in models], [one[measure] for one in models]
    figure = plotly("graph_objects", "picture").Figure()
    figure.add_scatter(
        x=xs,
        y=ys,
        error_y={
            "type": "data",
            "array": [high - y for y, (_, high) in zip(ys, ends, strict=True)],
            "arrayminus": [y - low for y, (low, _) in zip(ys, ends, strict=True)],
        },
        text=[f"{Path(one['model']).name}, {one['bpw']:.3f} bpw" for one in models],
        mode="markers+text",
        textposition="top center",
        name="models, with 95 % intervals",
    )
    best = [n for n, one in enumerate(models) if one["model"] in found["front"]]
    line = {"shape": "hv", "dash": "dot"}
    x, y = [xs[n] for n in best], [ys[n] for n in best]
    figure.add_scatter(x=x, y=y, mode="lines", line=line, name="no other is smaller and better")
    unit = f"KL to {found['base']}, nats per token" if measure == "kl" else "perplexity"
    title = f"{found['text']}, windows of {found['window']} tokens"
    figure.update_layout(title=title, xaxis_title="MiB on disk", yaxis_title=unit)
    figure.write_html(path, include_plotlyjs=True)
