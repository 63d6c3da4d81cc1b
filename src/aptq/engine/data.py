"""Token batches for calibration: windows of equal length over the documents of one source.

No special tokens are added and nothing is padded, so every row that a statistic sees is text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aptq.engine import sources

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# (samples, length, seed, starts) -> int64 ids [samples, length] drawn from the model itself, behind
# the tokens `starts` [samples, n] where there are any
Sampler = Callable[[int, int, int, Tensor | None], Tensor]
PROMPT = 32  # tokens of the text that a piece starts with which the model writes
PIECE = 512  # its tokens: several make a window, for long ones take their square to write


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which tokens to calibrate on.

    `source` is a path (.jsonl, .json, .parquet; .npy and .safetensors hold token ids; every other
    file is plain text), "hub:NAME", "builtin:pydoc", or "self" (sampled from the model).
    """

    source: str = "builtin:pydoc"  # English text in every CPython, so it works offline
    samples: int = 128  # windows, as in the experiments of GPTQ (arXiv:2210.17323)
    length: int = 512  # so that the default source is enough: 113,108 tokens are 220 windows
    # for every window of the text so many more that the model goes on to write from places in it,
    # for stages that tune the whole model: they learn a few windows by heart
    written: int = 0
    seed: int = 0  # the first windows of the text, which need no random numbers
    text_key: str = "text"  # what C4, WikiText and most sets on the hub call it
    split: str = "train"  # hub sets only; calibration must not see a test split
    config: str = ""  # hub sets only; empty: the data set's own default

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2 or min(self.seed, self.written) < 0:
            raise ValueError(
                "the calibration windows are impossible\n"
                f"samples {self.samples}, length {self.length}, written {self.written}, "
                f"seed {self.seed}\nuse samples >= 1, length >= 2, written >= 0, seed >= 0"
            )

    @property
    def needed(self) -> int:
        """Tokens that the windows take from the text."""
        return self.samples * self.length

    @property
    def total(self) -> int:
        """Tokens of all windows, also of those that the model writes."""
        return self.samples * (1 + self.written) * self.length

    @property
    def fields(self) -> sources.Fields:
        """How the text is found in the rows of the source."""
        return sources.Fields(key=self.text_key, split=self.split, config=self.config)


class Limits(NamedTuple):
    """What a model takes: `rows` of its embedding, longest window (None: no limit stated)."""

    rows: int
    positions: int | None


@dataclass(frozen=True)
class Batches:
    """Windows of token ids, `ids` int64 [samples, length], and where they came from.

    `found` counts the tokens of the text that was read, `whole` says whether that was all of it,
    `sha256` is of the ids as little-endian int64.
    """

    ids: Tensor
    source: str
    seed: int
    found: int
    whole: bool
    sha256: str
    written: int = 0  # windows at the end that the model wrote

    @property
    def text(self) -> Tensor:
        """The windows of the text alone."""
        return self.ids[: len(self.ids) - self.written]

    def __str__(self) -> str:
        samples, length = self.ids.shape
        text = f"{'' if self.whole else 'the first '}{self.found:,} in {self.source}"
        own = f", {self.written} of them written by the model" if self.written else ""
        count = f"{samples} x {length}{own} = {self.ids.numel():,} tokens"
        return f"{count} of {text} (seed {self.seed})"

    def record(self) -> dict[str, str | int | bool]:
        """What a log keeps of the calibration data (JSON values)."""
        samples, length = self.ids.shape
        return {
            "source": self.source,
            "samples": samples,
            "length": length,
            "written": self.written,
            "seed": self.seed,
            "tokens_used": samples * length,
            "tokens_found": self.found,
            "whole": self.whole,
            "sha256": self.sha256,
        }


def check_source(data: Data) -> None:
    """Refuse unreadable data before a model or tokenizer is loaded.  Raises ValueError."""
    sources.check(data.source, data.fields)


def limits_of(config: PreTrainedConfig) -> Limits:
    """Embedding rows and longest window that a transformers config states."""
    text = config.get_text_config()
    name = "max_position_embeddings"
    positions = text.to_dict().get(text.attribute_map.get(name, name))
    return Limits(rows=text.vocab_size, positions=positions)


def check_length(data: Data, limits: Limits) -> None:
    """Refuse windows longer than the model's positions.  Raises ValueError."""
    if limits.positions is not None and data.length > limits.positions:
        raise ValueError(
            "the calibration windows are longer than the model allows\n"
            f"length {data.length}, positions of the model {limits.positions}\n"
            f"set length to {limits.positions} or less"
        )


def check_ids(ids: Tensor, limits: Limits, where: str) -> None:
    """Refuse ids (any shape) without an embedding row; `where` is for the error.

    Raises ValueError.
    """
    highest = int(ids.max()) if ids.numel() else 0
    if highest >= limits.rows:
        raise ValueError(
            "the tokens come from the tokenizer of another model\n"
            f"{where}: highest id {highest}, embedding rows {limits.rows}\n"
            "use the tokenizer that belongs to this model"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    """Refuse a tokenizer whose own tokens (added ones aside) go beyond the embedding.

    Families such as Gemma 3 have added tokens without a row, which text never gives.
    Raises ValueError.
    """
    added = tokenizer.get_added_vocab().keys()
    own = [index for token, index in tokenizer.get_vocab().items() if token not in added]
    name = f"{type(tokenizer).__name__} of {len(tokenizer)} tokens"
    check_ids(torch.tensor(own, dtype=torch.int64), limits, name)


def token_stream(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, characters: int | None = None
) -> tuple[Tensor, bool]:
    """Tokens of a source, int64 [tokens], and whether the whole source was read.

    The text is tokenised in one piece, without special tokens; reading stops after `characters`.
    Raises ValueError as `check_source` does, and for "self".
    """
    form = sources.kind(data.source)
    if form == "self":
        raise ValueError(
            'the source "self" has no text of its own\n'
            "no sampler was given\n"
            "pass a function that draws tokens from the model, or another source"
        )
    if form in ("npy", "safetensors"):
        return sources.read_ids(data.source), True
    text, whole = sources.read_text(data.source, data.fields, characters)
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning that a text is longer than a window
    )
    return torch.tensor(encoded["input_ids"], dtype=torch.int64), whole


def tokens(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limits: Limits | None = None,
    sampler: Sampler | None = None,
) -> Batches:
    """The calibration windows that `data` describes.

    Seed 0 takes the first windows, seed s > 0 as many at random offsets (they may overlap); for
    "self" the seed goes to `sampler`.  Of a very large source only the beginning is read.
    Raises ValueError as `check_source`, `check_length` and `check_ids` do, and if the text is
    shorter than the windows need.
    """
    if limits is not None:
        check_length(data, limits)
        check_vocabulary(tokenizer, limits)
    seed = data.seed
    if data.source == "self" and sampler is not None:
        stream, whole = sampler(data.samples, data.length, seed, None).cpu().reshape(-1), True
        seed = 0  # the windows are drawn already
    else:
        # 16 characters a needed token are ample, and 4 Mi hold usual calibration texts whole
        stream, whole = token_stream(data, tokenizer, characters=max(1 << 22, 16 * data.needed))
    if limits is not None:
        where = f"{data.source}, {type(tokenizer).__name__} of {len(tokenizer)} tokens"
        check_ids(stream, limits, where)
    if stream.numel() < data.needed:
        raise _too_short(data, stream.numel())
    ids = _windows(stream, data, seed)
    if data.written:
        ids = torch.cat([ids, _written(stream, data, sampler)])
    sha256 = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    own = data.samples * data.written
    return Batches(ids, data.source, data.seed, stream.numel(), whole, sha256, own)


def _written(stream: Tensor, data: Data, sampler: Sampler | None) -> Tensor:
    """Windows [samples * written, length] of pieces that begin at random places of a stream."""
    if sampler is None:
        raise ValueError(
            "nobody writes the windows\n"
            f"written = {data.written} and no sampler was given\n"
            "pass a function that draws tokens from the model, or set written = 0"
        )
    length = min(PIECE, data.length)
    count, total = min(PROMPT, length // 2), data.total - data.needed
    generator = torch.Generator().manual_seed(data.seed)
    pieces = -(-total // length)
    starts = torch.randint(0, stream.numel() - count + 1, (pieces, 1), generator=generator)
    begun = stream[starts + torch.arange(count)]
    made = sampler(pieces, length, data.seed, begun).cpu().flatten()
    return made[:total].view(-1, data.length)


def _windows(stream: Tensor, data: Data, seed: int) -> Tensor:
    """Windows [samples, length] of a stream [tokens]."""
    if seed == 0:
        return stream[: data.needed].reshape(data.samples, data.length).clone()
    generator = torch.Generator().manual_seed(seed)
    last = stream.numel() - data.length
    starts = torch.randint(0, last + 1, (data.samples, 1), generator=generator)
    return stream[starts + torch.arange(data.length)]


def _too_short(data: Data, found: int) -> ValueError:
    windows = found // data.length
    advice = f"set samples to {windows} or less" if windows else "use shorter windows"
    return ValueError(
        "the calibration text is too short\n"
        f"{data.source}: {found:,} tokens found, {data.needed:,} needed "
        f"({data.samples} windows of {data.length})\n"
        f"{advice}, or give more text"
    )
