"""Figures of a model or run: perplexity, and divergence from the original."""

import json
import time
from pathlib import Path
from typing import Any

from aptq.engine.data import Data, check_source, token_stream
from aptq.evaluate.divergence import divergence
from aptq.evaluate.perplexity import perplexity
from aptq.report import card
from aptq.runtime.open import find_device, open_any
from aptq.work import Report, Step, silent

BUILTIN_WINDOWS = 8  # of builtin:pydoc, taken from its end, for calibration reads its beginning


def assess(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    data: Data | None = None,
    windows: int | None = None,
    window: int = 2048,
    device: str = "auto",
    revision: str | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Perplexity of `source`, and with a `reference` its perplexity and the divergence from it.

    Takes the first `windows` (all if None) windows of the text; of builtin:pydoc the last ones, for
    calibration reads its beginning.  Written to eval.json and the card if `source` is a run.
    """
    began, on = time.perf_counter(), find_device(device)
    text = data or Data()
    check_source(text)
    report(Step("load the model", 0, 1))
    model, tokenizer = open_any(source, on, revision=revision)
    report(Step("load the model", 1, 1))
    ids, _ = token_stream(text, tokenizer)
    if text.source == "builtin:pydoc":
        windows = windows or BUILTIN_WINDOWS
        ids = ids[-windows * window :]

    def progress(done: int, total: int) -> None:
        report(Step("evaluate", done, total))

    result: dict[str, Any] = {"model": str(source), "text": text.source, "window": window}
    if reference is None:
        found = perplexity(model, ids, window=window, limit=windows, device=on, progress=progress)
        result |= {"reference": None, "kl": None, "agreement": None}
    else:
        wanted, _ = open_any(reference, on, revision=revision)
        both = divergence(
            model, wanted, ids, window=window, limit=windows, device=on, progress=progress
        )
        found = both.model
        result["reference"] = {"model": str(reference), "perplexity": both.reference.ppl}
        result |= {"kl": both.kl, "agreement": both.agreement}
    result |= {"perplexity": found.ppl, "nll": found.nll}
    result |= {"windows": found.windows, "predictions": found.tokens}
    result["seconds"] = round(time.perf_counter() - began, 3)
    run = Path(source)
    if (run / "log.jsonl").is_file():
        (run / "eval.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        card.write(run)
    return result
