"""Tape: the inputs of all blocks for all windows, kept by a forward walk for a walk backward.

They lie in memory while they are small, else in one file a block that is deleted after use, so
that peak memory depends neither on the depth nor on the number of windows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from aptq.engine.stream import Stream, Where, batch_windows, free_bytes, open_stream, storage
from aptq.engine.walk import Progress, reported
from aptq.model.model import Model

SHARE = 4  # a block's values for autograd take several times those of its plain forward


def tape_bytes(model: Model, tokens: int) -> int:
    """Most bytes that a walk backward over `tokens` tokens keeps in memory or on the disk.

    The inputs of all blocks, and the gradients that enter and leave the block at work.
    """
    width: int = model.config.get_text_config().hidden_size
    return (model.blocks + 2) * tokens * width * model.dtype.itemsize


@dataclass
class Slot:
    """Hidden states or their gradients [windows, length, width], in memory or in a file."""

    states: Tensor
    file: Path | None

    def close(self) -> None:
        """Free them."""
        self.states = self.states.new_empty(0)
        if self.file is not None:
            self.file.unlink(missing_ok=True)


@dataclass
class Tape:
    """Slot i holds the input of block i, and one more the output of the last block.

    A backward walk uses a tape up: it deletes each slot when it is done with the block.
    """

    stream: Stream
    folder: Path
    where: Where
    slots: list[Slot] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that there are now."""
        return sum(slot.states.nbytes for slot in self.slots)

    def add(self) -> Slot:
        """A new slot behind the others, its content undefined."""
        like = self.slots[0].states
        name = f"tape-{len(self.slots):04}"
        slot = Slot(*storage(tuple(like.shape), like, self.folder, self.where, name))
        self.slots.append(slot)
        return slot

    def leave(self, index: int) -> None:
        """Delete the input of block `index` and the gradient of its output."""
        for slot in self.slots[index : index + 2]:
            slot.close()
        del self.slots[index : index + 2]
        self.stream.hidden = self.stream.hidden.new_empty(0)  # its file is freed with its mapping

    def close(self) -> None:
        """Delete what is left, with its files."""
        for slot in self.slots:
            slot.close()
        self.slots.clear()
        self.stream.close()


def open_tape(
    model: Model,
    ids: Tensor,
    *,
    device: torch.device,
    folder: Path,
    where: Where = "auto",
    report: Callable[[Progress], None] | None = None,
) -> Tape:
    """Walk forward over `ids` [windows, length] int64, one block in memory, keeping all inputs.

    where="auto" keeps them on the device while `tape_bytes` is less than a quarter of its free
    memory, and in files `tape-*.bin` in `folder` otherwise.
    """
    if where == "auto":
        small = tape_bytes(model, ids.numel()) <= free_bytes(device) // 4
        where = "memory" if small else "disk"
    batch = max(1, batch_windows(ids.shape[1], device) // SHARE)
    stream = open_stream(
        model, ids, device=device, folder=folder, where=where, batch=batch, name="tape-0000"
    )
    tape = Tape(stream, folder, where, [Slot(stream.hidden, stream.file)])
    try:
        for index in reported(range(model.blocks), model.blocks, report):
            _forward(model, tape, index)
    except BaseException:
        tape.close()
        raise
    return tape


def _forward(model: Model, tape: Tape, index: int) -> None:
    """Fill the next slot with the output of block `index`."""
    output = tape.add().states
    block = model.load(index, tape.stream.device)
    with torch.inference_mode():
        for windows, call in tape.stream.inputs(index):
            output[windows] = call.run(block).to(output.device)
    tape.stream.hidden = output
    model.unload(index)
