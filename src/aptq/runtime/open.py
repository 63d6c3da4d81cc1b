"""Any model ready to run: a run folder, a checkpoint, or whatever `Model.open` takes."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from aptq.model.model import Model
from aptq.model.sources import read_tokenizer
from aptq.runtime.load import load
from aptq.store.manifest import NAME


class Ready(NamedTuple):
    """A model in eval mode on its device, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def find_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one.  Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no device {name!r}\n{reason}\nuse cpu, cuda or cuda:1") from error


def compressed_folder(source: str | Path) -> Path | None:
    """The checkpoint folder if `source` is a run or a checkpoint, else None."""
    path = Path(source)
    places = (path, path / "checkpoint")
    return next((place for place in places if (place / NAME).is_file()), None)


def original(source: str | Path, device: torch.device, *, revision: str | None = None) -> Ready:
    """An ordinary model, whole and uncompressed.  Raises ValueError as `Model.open` does."""
    opened = Model.open(source, revision=revision, partial=True)  # all of it is taken as it is
    model = AutoModelForCausalLM.from_pretrained(
        opened.folder,
        config=opened.config,
        dtype=opened.dtype,
        local_files_only=True,
        trust_remote_code=False,
    )
    assert isinstance(model, PreTrainedModel), type(model)
    return Ready(model.to(device).eval(), opened.tokenizer)


def open_any(source: str | Path, device: torch.device, *, revision: str | None = None) -> Ready:
    """A compressed or an ordinary model.  Raises ValueError for what can be read as neither."""
    checkpoint = compressed_folder(source)
    if checkpoint is None:
        return original(source, device, revision=revision)
    return Ready(load(checkpoint, device=device), read_tokenizer(checkpoint))
