"""Journal: generations that are whole or not there, and what happens where one is damaged."""

from pathlib import Path

import pytest
import torch

from aptq.failures import Corrupt
from aptq.store.objects import CURRENT, FOLDER, LOG, Journal
from aptq.store.resume import Lock, differences


def log(root: Path, line: str) -> None:
    with (root / LOG).open("a") as file:
        file.write(f"{line}\n")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Two generations: one object of its own each, one in common, and a line of the log each."""
    made = Journal(tmp_path)
    made.put_tensors("common", {"x": torch.arange(3)})
    for number in range(2):
        log(tmp_path, f"line {number}")
        made.values["number"] = number
        made.put("own", [f"text {number}".encode()])
        made.publish()
    log(tmp_path, "line of no generation")
    return made


def loaded(journal: Journal) -> Journal:
    found = Journal(journal.root)
    assert found.load()
    return found


def test_newest_generation(journal: Journal) -> None:
    found = loaded(journal)
    assert found.values == {"number": 1}
    assert found.path("own").read_text() == "text 1"  # type: ignore[union-attr]
    assert torch.equal(found.tensors("common")["x"], torch.arange(3))
    assert (journal.root / LOG).read_text() == "line 0\nline 1\n"


def test_nothing_published(tmp_path: Path) -> None:
    made = Journal(tmp_path)
    made.put("x", [b"y"])
    assert not Journal(tmp_path).load()


@pytest.mark.parametrize("victim", ["own", "document"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_older_generation_where_the_newest_is_damaged(
    journal: Journal, victim: str, how: str
) -> None:
    file = journal.root / FOLDER / journal.heads[0]
    if victim == "own":
        file = journal.path("own") or file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    if how != "remove":
        file.write_bytes(data if how == "flip" else data[:-1])
    found = loaded(journal)
    assert found.values == {"number": 0}
    assert found.path("own").read_text() == "text 0"  # type: ignore[union-attr]
    assert (journal.root / LOG).read_text() == "line 0\n"
    found.values["number"] = 2
    found.publish()
    assert loaded(journal).values == {"number": 2}


@pytest.mark.parametrize("victim", ["common", "log", CURRENT, "foreign"])
def test_no_sound_generation(journal: Journal, victim: str) -> None:
    if victim == "common":
        (journal.path("common") or journal.root).write_bytes(b"")
    elif victim == "log":
        (journal.root / LOG).write_text("line 0")
    elif victim == CURRENT:
        (journal.root / FOLDER / CURRENT).write_bytes(b"\xff\x00 nonsense")
    else:
        (journal.root.parent / "outside").write_bytes(b"")
        journal.adopt("outside", journal.root / ".." / "outside", "0" * 64)
        for number in (7, 8):
            journal.values["number"] = number
            journal.publish()
    with pytest.raises(Corrupt, match=f"remove {journal.root} and start again"):
        Journal(journal.root).load()


def test_two_generations_are_kept_and_no_more(journal: Journal) -> None:
    folder = journal.root / FOLDER
    (folder / "incoming.tmp").touch()  # of a write that was killed
    for number in range(5):
        journal.put("own", [f"new {number}".encode()])
        journal.publish()
    names = {file.name for file in folder.iterdir()}
    assert len(names) == 1 + 2 + 2 + 1, names  # CURRENT, documents, own ones, the common one
    journal.drop(lambda name: name != "common")
    journal.publish()
    journal.publish()  # nothing new: no generation
    assert journal.path("common") is None
    assert len({*folder.iterdir()}) == 1 + 2 + 2
    journal.values["number"] = 9
    journal.publish()
    assert len({*folder.iterdir()}) == 1 + 2 + 1


def test_lock_of_the_dead_and_of_others(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text('{"pid": 1, "host": "elsewhere", "start": "2026-01-01"}')
    with pytest.raises(ValueError, match="process 1 on elsewhere since 2026") as caught:
        Lock(path)
    assert f"remove {path}" in str(caught.value)
    path.write_text('{"pid": 1, "ho')  # cut off by a crash, on this host: the system has freed it
    held = Lock(path)
    with pytest.raises(ValueError, match="another process is at work"):
        Lock(path)
    held.release()
    Lock(path).release()


def test_differences_are_named() -> None:
    old = {"a": 1, "b": {"c": [1], "d": "x"}}
    assert differences(old, {"a": 2, "b": {"c": [1]}}) == ["a: 1 -> 2", "b.d: x -> nothing"]
