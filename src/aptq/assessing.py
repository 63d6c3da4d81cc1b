"""Figures of a model or run: perplexity, divergence from the original, scores of tasks."""

import json
import math
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from aptq.engine.data import Data, check_source, token_stream
from aptq.evaluate import harness
from aptq.evaluate.divergence import Divergence, divergence
from aptq.evaluate.harness import Score
from aptq.evaluate.intervals import interval, paired
from aptq.evaluate.perplexity import Perplexity, perplexity, position_bins, ppl_of
from aptq.report import card
from aptq.runtime.open import Ready, find_device, open_any
from aptq.work import Report, Step, silent

Windows = TypeVar("Windows", Perplexity, Divergence)
BUILTIN_WINDOWS = 8  # of builtin:pydoc, taken from its end, for calibration reads its beginning


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What a model is asked."""

    texts: tuple[Data, ...] = (Data(),)  # by default what Python carries: it needs no file
    # the first ones of each text, all if None; of builtin:pydoc the last BUILTIN_WINDOWS
    windows: int | None = None
    window: int = 2048  # tokens; what published perplexities are taken with
    tasks: tuple[str, ...] = ()  # of lm-eval, or .jsonl files; none by default, they take minutes
    limit: int | None = None  # items of each task, drawn by `seed`; all if None, as lm-eval does
    seed: int = 0  # of items and bootstrap draws; any number will do

    def __post_init__(self) -> None:
        for text in self.texts:
            check_source(text)

    @property
    def name(self) -> str:
        """The texts in words."""
        return ", ".join(text.source for text in self.texts)

    def ids(self, ready: Ready) -> dict[str, Tensor]:
        """Tokens int64 [tokens] of every text, cut to the windows that are asked for."""
        found = {}
        for text in self.texts:
            ids, _ = token_stream(text, ready.tokenizer)
            count = self.windows
            if text.source == "builtin:pydoc":
                count = count or BUILTIN_WINDOWS
                ids = ids[-count * self.window :]
            found[text.source] = ids if count is None else ids[: count * self.window]
        return found


@dataclass(frozen=True)
class Findings:
    """What one model gave: by text its perplexity and divergence (if asked for), and scores."""

    texts: dict[str, Perplexity]
    apart: dict[str, Divergence] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()

    def to_json(self, base: "Findings | None" = None, seed: int = 0) -> dict[str, Any]:
        """Figures with intervals, over all texts and by text; differences from `base`, paired."""
        names = list(self.texts)

        def figures(some: Sequence[str]) -> dict[str, Any]:
            ours = _joined(self.texts, some)
            theirs = None if base is None else _joined(base.texts, some)
            return _figures(ours, _joined(self.apart, some) if self.apart else None, theirs, seed)

        by_text = [{"text": name, **figures([name])} for name in names]
        found = {**figures(names), "texts": by_text if len(names) > 1 else []}
        return {**found, "tasks": _tasks(self.scores, () if base is None else base.scores)}


def examine(
    ready: Ready, exam: Exam, *, reference: Ready | None = None, report: Report = silent
) -> Findings:
    """Ask a model; with a `reference` also how far it is from it.  Raises ValueError."""
    texts: dict[str, Perplexity] = {}
    apart: dict[str, Divergence] = {}
    ids = exam.ids(ready)
    for name, tokens in ids.items():

        def progress(done: int, total: int, name: str = name) -> None:
            report(Step(f"evaluate {Path(name).name}", done, total))

        if reference is None:
            texts[name] = perplexity(ready.model, tokens, window=exam.window, progress=progress)
        else:
            apart[name] = divergence(
                ready.model, reference.model, tokens, window=exam.window, progress=progress
            )
            texts[name] = apart[name].model
    return Findings(texts, apart, _scored(ready, exam, report))


def _scored(ready: Ready, exam: Exam, report: Report) -> tuple[Score, ...]:
    if not exam.tasks:
        return ()
    return harness.score(
        *ready,
        exam.tasks,
        limit=exam.limit,
        seed=exam.seed,
        progress=lambda done, total: report(Step("answer", done, total)),
    )


def assess(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    data: Data | None = None,
    windows: int | None = None,
    window: int = 2048,
    exam: Exam | None = None,
    device: str = "auto",
    revision: str | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Perplexity of `source`, and with a `reference` its perplexity and the divergence from it.

    Takes the first `windows` (all if None) windows of the text; of builtin:pydoc the last ones, for
    calibration reads its beginning.  An `exam` stands for data, windows and window: with several
    texts, and tasks.  Written to eval.json and the card if `source` is a run.
    """
    began, on = time.perf_counter(), find_device(device)
    exam = exam or Exam(texts=(data or Data(),), windows=windows, window=window)
    report(Step("load the model", 0, 1))
    ready = open_any(source, on, revision=revision)
    report(Step("load the model", 1, 1))
    result: dict[str, Any] = {"model": str(source), "text": exam.name, "window": exam.window}
    result["reference"] = None
    if reference is None:
        result |= examine(ready, exam, report=report).to_json(seed=exam.seed)
    else:
        wanted = open_any(reference, on, revision=revision)
        found = examine(ready, exam, reference=wanted, report=report)
        theirs = {name: both.reference for name, both in found.apart.items()}
        base = Findings(theirs, scores=_scored(wanted, exam, report))
        whole = _joined(theirs, list(theirs))
        result["reference"] = {"model": str(reference), "perplexity": whole.ppl}
        result["reference"]["nlls"] = list(whole.nlls)
        result |= found.to_json(base, exam.seed)
    result["seconds"] = round(time.perf_counter() - began, 3)
    run = Path(source)
    if (run / "log.jsonl").is_file():
        (run / "eval.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        card.write(run)
    return result


def _joined(found: Mapping[str, Windows], names: Sequence[str]) -> Windows:
    return reduce(operator.add, [found[name] for name in names])


def _figures(
    found: Perplexity, apart: Divergence | None, base: Perplexity | None, seed: int
) -> dict[str, Any]:
    """One model on one text, or on all."""
    around = interval(found.nlls, seed=seed)
    result: dict[str, Any] = {"perplexity": found.ppl, "nll": found.nll}
    result["perplexity_interval"] = None if around is None else [ppl_of(end) for end in around]
    result |= {"windows": found.windows, "predictions": found.tokens, "nlls": list(found.nlls)}
    for key, values in (
        ("kl", () if apart is None else apart.kls),
        ("agreement", () if apart is None else apart.agreements),
        ("difference", _moved(found, base)),
    ):
        ends = interval(values, seed=seed)
        result[key] = math.fsum(values) / len(values) if values else None
        result[f"{key}_interval"] = None if ends is None else list(ends)
    kls = [] if apart is None else _columns(apart.binned)
    result["positions"] = [
        {"first": first, "last": last, "perplexity": ppl_of(nll), "kl": kl}
        for (first, last), nll, kl in zip_longest(
            position_bins(found.window), _columns(found.binned), kls
        )
    ]
    return result


def _moved(found: Perplexity, base: Perplexity | None) -> list[float]:
    """NLL minus that of `base` in nats, window by window."""
    if base is None:
        return []
    return [ours - theirs for ours, theirs in zip(found.nlls, base.nlls, strict=True)]


def _columns(rows: Sequence[Sequence[float]]) -> list[float]:
    """Means over the windows."""
    return [math.fsum(column) / len(column) for column in zip(*rows, strict=True)]


def _tasks(scores: Sequence[Score], base: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores as plain values, with the paired difference from those of `base`."""
    theirs = {(one.task, one.metric): one for one in base}
    rows = []
    for one in scores:
        row: dict[str, Any] = {"task": one.task, "metric": one.metric, "value": one.value}
        row |= {"stderr": one.stderr, "items": len(one.items), "against": None}
        other = theirs.get((one.task, one.metric))
        if other is not None and one.values and one.items == other.items:
            row["against"] = {"value": other.value, **asdict(paired(one.values, other.values))}
        rows.append(row)
    return rows
