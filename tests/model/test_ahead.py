"""Reading ahead: what is held is the block that was guessed, in either direction."""

import threading

import pytest
import torch

from aptq.model.ahead import Ahead
from aptq.model.model import Model
from tests.tiny import tiny_model


class Pinned:
    """Stands for a stored tensor; a GPU is needed to pin a real one."""

    def __init__(self, name: str) -> None:
        self.name, self.thread = name, threading.current_thread()

    def pin_memory(self) -> "Pinned":
        return self


def reader(blocks: int) -> tuple[Ahead, list[str]]:
    seen: list[str] = []

    def read(name: str) -> Pinned:
        seen.append(name)
        return Pinned(name)

    names = {index: [f"{index}.a", f"{index}.b"] for index in range(blocks)}
    return Ahead(lambda index: names.get(index, []), read), seen  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_the_next_block_is_there(order: list[int]) -> None:
    ahead, seen = reader(4)
    hits = []
    for index in order:
        held = ahead.take(index)
        hits.append(sorted(held) == [f"{index}.a", f"{index}.b"])
        assert not held or held[f"{index}.a"].thread is not threading.current_thread()
        ahead.start(index)
    # the first is never known, nor backwards the second: its direction is not
    assert hits == [False, order[0] == 0, True, True]
    assert len(seen) == 2 * sum(hits)


def test_a_wrong_guess_is_dropped() -> None:
    ahead, seen = reader(9)
    ahead.start(2)
    assert ahead.take(7) == {}
    assert ahead.take(3) == {}
    assert seen == ["3.a", "3.b"]


@pytest.mark.gpu
def test_weights_read_ahead_are_the_stored_ones(tmp_path) -> None:
    model = Model.open(tiny_model("llama", tmp_path / "model", torch.bfloat16))
    for index in range(model.blocks):
        one = {n: t.cpu() for n, t in model.load(index, "cuda").state_dict().items()}
        model.unload(index)
        two = model.load(index).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)
        model.unload(index)
