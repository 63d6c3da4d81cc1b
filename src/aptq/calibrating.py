"""Calibration windows of a run; those that the model has written outlive an interruption."""

from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from aptq.engine.data import Batches, Data, limits_of, tokens
from aptq.model.model import Model
from aptq.runtime.generate import sample
from aptq.runtime.open import original
from aptq.store.objects import Journal
from aptq.store.resume import source_files
from aptq.work import Report, Step


def calibration(
    model: Model,
    data: Data,
    source: str | Path,
    revision: str | None,
    device: torch.device,
    report: Report,
    journals: tuple[Journal, ...],
) -> Batches:
    """Calibration windows; where the model writes some the whole original is loaded for it.

    What it writes is kept in the journals, of runs that share it, with what it was drawn for.
    """
    first, limits = journals[0], limits_of(model.config)

    def sampler(samples: int, length: int, seed: int, starts: Tensor | None) -> Tensor:
        begun = b"" if starts is None else starts.numpy().tobytes()
        asked = [repr(data), sha256(begun).hexdigest(), source_files(model.folder, whole=False)]
        if first.path("written") is not None and first.values["written"] == asked:
            return first.tensors("written")["ids"]
        writer = original(source, device, revision=revision)
        bos = writer.tokenizer.bos_token_id

        def show(done: int, total: int) -> None:
            report(Step("write windows", done, total))

        ids = sample(writer.model, samples, length, seed, bos=bos, starts=starts, report=show)
        for journal in journals:
            journal.values["written"] = asked
            journal.put_tensors("written", {"ids": ids.cpu().contiguous()})
            journal.publish()
        return ids

    return tokens(data, model.tokenizer, limits=limits, sampler=sampler)
