"""Stream: the hidden states that enter the current block, for every calibration window.

They live on the device while they are small, those of a GPU else in pinned memory of the host, and
at last in a memory-mapped file: its pages are written out by the system under pressure, so peak
memory does not grow with the number of windows.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import psutil
import torch
from torch import Tensor, nn

from aptq.engine.heap import bound_heap
from aptq.engine.stat import MOST_DROPPED
from aptq.failures import Unsound
from aptq.model.dry import Call, record
from aptq.model.model import Model

Where = Literal["auto", "memory", "disk"]
T = TypeVar("T")
STACKED = 512 << 20  # bytes; a CPU gains nothing from more


def batch_windows(length: int, device: torch.device) -> int:
    """Windows in a batch: about 2,048 tokens on a CPU (fits its caches), 32,768 on a GPU."""
    return max(1, (2048 if device.type == "cpu" else 32768) // length)


def free_bytes(device: torch.device) -> int:
    """Free memory of `device` in bytes."""
    if device.type == "cuda":  # with what torch has taken and does not use
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return int(psutil.virtual_memory().available)


def stack_bytes(device: torch.device) -> int:
    """What candidates that are rounded together may take: on a GPU a quarter of what is free."""
    free = free_bytes(device) if device.type == "cuda" and torch.cuda.is_available() else 0
    return max(STACKED, free // 4)


def sliced(items: Iterable[T], size: Callable[[T], int], device: torch.device) -> list[list[T]]:
    """Cut `items` of some bytes each so that one slice takes at most half of the free memory."""
    limit, used = free_bytes(device) // 2, 0
    slices: list[list[T]] = [[]]
    for item in items:
        if slices[-1] and used + size(item) > limit:
            slices.append([])
            used = 0
        slices[-1].append(item)
        used += size(item)
    return slices


@dataclass
class Stream:
    """Hidden states [windows, length, width] and the other arguments of every block."""

    hidden: Tensor
    calls: list[dict[int, Call]]  # block -> batch size -> what else it is called with
    batch: int
    device: torch.device
    file: Path | None = None

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self.hidden.shape[1]

    @property
    def place(self) -> str:
        """Where the states lie and how much they take, for a person."""
        memory = "on the GPU" if self.hidden.is_cuda else "in memory"
        where = f"in {self.file}" if self.file is not None else memory
        return f"{where}, {self.hidden.nbytes / 1e9:.1f} GB"

    def inputs(self, index: int) -> Iterator[tuple[slice, Call]]:
        """(windows, call of the block with their hidden states) of every batch for a block."""
        total = self.hidden.shape[0]
        starts = range(0, total, self.batch)
        batches = [slice(start, min(start + self.batch, total)) for start in starts]
        for windows, x in zip(batches, self._brought(batches), strict=True):
            yield windows, self.calls[index][x.shape[0]].at(x)

    def _brought(self, batches: Sequence[slice]) -> Iterator[Tensor]:
        """The states of batches on the device; a GPU gets the next ones while it works."""
        if self.device.type != "cuda" or self.hidden.is_cuda:
            yield from (self.hidden[windows].to(self.device) for windows in batches)
            return
        copier = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        worker = torch.cuda.current_stream(self.device)
        coming: Tensor | None = None
        for following in [*batches, None]:
            x, coming = coming, None
            worker.wait_stream(copier)
            if following is not None:
                with torch.cuda.stream(copier):
                    coming = self.hidden[following].to(self.device, non_blocking=True)
            if x is not None:
                x.record_stream(worker)
                yield x

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace every hidden state by the output of block `index`.

        Raises Unsound where more than a tenth of the tokens are not finite: nothing can be learnt.
        """
        bad = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            for windows, call in self.inputs(index):
                out = call.run(block)
                bad = bad + (~out.sum(-1, dtype=torch.float32).isfinite()).sum()
                self.hidden[windows] = out.to(self.hidden.device)
        self.calls[index] = {}
        tokens = self.hidden.shape[0] * self.length
        if int(bad) > MOST_DROPPED * tokens:
            raise Unsound(
                f"the activations are not finite behind block {index}\n{int(bad)} of {tokens} "
                f"tokens hold NaN or Inf in {self.hidden.dtype}\ncheck the weights up to there, or "
                "convert a model in fp16 to bf16, which has a wider range"
            )

    def twin(self, name: str = "original") -> "Stream":
        """A copy that advances by itself: in memory, or in a file beside the one of this stream."""
        if self.file is None:
            pinned = self.hidden.is_pinned()
            held, file = torch.empty_like(self.hidden, pin_memory=pinned), None
            held.copy_(self.hidden)
        else:
            shape = tuple(self.hidden.shape)
            held, file = storage(shape, self.hidden, self.file.parent, "disk", name)
            for part, source in zip(held, self.hidden, strict=True):
                part.copy_(source)
        return Stream(held, [dict(call) for call in self.calls], self.batch, self.device, file)

    def drift(self, other: "Stream", windows: int = 8) -> float:
        """Relative squared distance of the states from those of `other`, a mean over tokens.

        Of the first `windows`; by token, for the norms of a window's first ones dwarf all others.
        """
        mine, theirs = self.hidden[:windows].float(), other.hidden[:windows].float()
        ratio = (mine - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
        return float(ratio.mean())

    def learn(self, model: Model, sizes: Iterable[int]) -> None:
        """Record how blocks are called with batches of other sizes.

        Nothing but the hidden states depends on the tokens (dry_pass has checked it), so any do.
        """
        missing = sorted(set(sizes) - set(self.calls[-1])) if len(self.hidden) else []
        if not missing:
            return
        model.load_outer(self.device)
        empty = self.hidden.new_empty(0)
        for size in missing:
            ids = torch.zeros(size, self.length, dtype=torch.int64, device=self.device)
            recorded = record(model.skeleton, model.arch.blocks, ids)
            for block, call in enumerate(recorded):
                self.calls[block][size] = call.at(empty)
        model.unload_outer()

    def close(self) -> None:
        """Delete the file behind the stream, if there is one."""
        self.hidden = self.hidden.new_empty(0)
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def open_stream(
    model: Model,
    ids: Tensor,
    *,
    device: torch.device,
    folder: Path,
    where: Where = "auto",
    batch: int | None = None,
    name: str = "hidden",
) -> Stream:
    """Embed `ids` [windows, length] int64 and record every block's other arguments.

    where="auto" keeps the states on the device while they take less than a quarter of its free
    memory, else those of a GPU in a quarter of the host's, and in the file `name`.bin in `folder`
    otherwise.  `batch`: windows in a batch.
    """
    batch = min(batch or batch_windows(ids.shape[1], device), ids.shape[0])
    calls: list[dict[int, Call]] = [{} for _ in range(model.blocks)]
    stream: Stream | None = None
    bound_heap()  # before the first large tensor
    model.load_outer(device)
    for start in range(0, ids.shape[0], batch):
        part = ids[start : start + batch].to(device)
        recorded = record(model.skeleton, model.arch.blocks, part)
        hidden = recorded[0].hidden
        if stream is None:
            shape = (ids.shape[0], *hidden.shape[1:])
            held, file = storage(shape, hidden, folder, where, name)
            stream = Stream(held, calls, batch, device, file)
        stream.hidden[start : start + part.shape[0]] = hidden.to(stream.hidden.device)
        if part.shape[0] not in calls[0]:
            empty = hidden.new_empty(0)
            for block, call in enumerate(recorded):
                calls[block][part.shape[0]] = call.at(empty)
    model.unload_outer()
    assert stream is not None, f"no windows in ids of shape {tuple(ids.shape)}"
    return stream


def storage(
    shape: tuple[int, ...], like: Tensor, folder: Path, where: Where, name: str
) -> tuple[Tensor, Path | None]:
    """A tensor of `shape` on the device of `like`, pinned, or mapped onto the file `name`.bin."""
    count = torch.Size(shape).numel()
    need = count * like.dtype.itemsize
    if where == "memory" or (where == "auto" and need <= free_bytes(like.device) // 4):
        return torch.empty(shape, dtype=like.dtype, device=like.device), None
    if where == "auto" and like.is_cuda and need <= free_bytes(torch.device("cpu")) // 4:
        return torch.empty(shape, dtype=like.dtype, pin_memory=True), None
    file = folder / f"{name}.bin"
    with file.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(need, 1))  # a full disk is an error only here
    mapped = torch.from_file(str(file), shared=True, size=count, dtype=like.dtype)
    return mapped.view(shape), file
