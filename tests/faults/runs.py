"""Cases 22 to 27 and 30: disks, kills, locks, memory, interrupts."""

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from aptq.engine.stream import Stream
from aptq.runtime.load import load
from aptq.versions import SUPPORTED
from tests.faults.bench import GPTQ, RTN, Box, case
from tests.faults.figures import custom

BLOCKS = 8
WORDS = ("--recipe", "gptq", "--grid", "int4-g16-z", "--samples", "8", "--length", "64")


def deep(box: Box) -> Path:
    """A model whose run takes some seconds."""
    held = box.models / "deep"
    if not held.is_dir():
        box.models.mkdir(exist_ok=True)
        made = custom(box, "llama", num_hidden_layers=BLOCKS, intermediate_size=256)
        made.rename(held)
    return held


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of all files of a run's checkpoint."""
    found: dict[str, str] = json.loads((out / "checkpoint" / "aptq.json").read_text())["files"]
    return found


def whole(box: Box) -> dict[str, str]:
    """The hashes of an uninterrupted run, with the threads that processes here get."""
    out = box.models / "whole-run"
    if not out.is_dir():
        box.ended(box.process("compress", deep(box), "--out", out, *WORDS)).be(0)
    return hashes(out)


def work(out: Path) -> Path:
    """The folder of an unfinished run."""
    return out.with_name(out.name + ".partial")


def finished(out: Path) -> int:
    """Blocks that the log of an unfinished run knows."""
    log = work(out) / "log.jsonl"
    return log.read_text().count('"event": "block"') if log.is_file() else 0


def killed(box: Box, out: Path, blocks: int, number: int = signal.SIGKILL) -> None:
    """A run that gets a signal when so many blocks are done, or at the end of it all."""
    process = box.process("compress", deep(box), "--out", out, *WORDS)
    while process.poll() is None and finished(out) < blocks:
        time.sleep(0.005)
    process.send_signal(number)
    seen = box.ended(process)
    assert seen.code != 0 or out.is_dir(), seen.short()


@case(22, "disk full", "code 4, needed and free; nothing under the final name; then it goes on")
def full_disk(box: Box) -> None:
    folder = deep(box)
    usage = shutil.disk_usage(box.root)
    with patch.object(shutil, "disk_usage", lambda _: usage._replace(free=1000)):
        box.compress(folder).be(4, "1,000 free", "needed")
    out = box.out()

    def limited() -> None:  # stands in for a small disk: no file may grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = ["compress", folder, "--out", out, *WORDS]
    with patch("tests.faults.bench.subprocess.Popen", _with(limited)):
        process = box.process(*command)
    box.ended(process).be(4, "free")
    assert not out.exists()
    box.ended(box.process(*command)).be(0)
    assert hashes(out) == whole(box)


def _with(before: Any) -> Any:
    real = subprocess.Popen

    def start(*words: Any, **options: Any) -> Any:
        return real(*words, **options, preexec_fn=before)

    return start


@case(23, "kill -9 anywhere", "the same command goes on, equal hashes, one block repeated at most")
def kills(box: Box) -> None:
    expected, draw = whole(box), random.Random(7)
    for blocks in (0, draw.randrange(1, BLOCKS - 1), BLOCKS):
        out = box.out()
        killed(box, out, blocks)
        done = finished(out)
        if not out.is_dir():
            box.ended(box.process("compress", deep(box), "--out", out, *WORDS)).be(0)
        assert hashes(out) == expected
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        again = [line["block"] for line in lines if line["event"] == "block"]
        assert len(again) <= BLOCKS + 1, (done, again)


@case(24, "resumed after something changed", "code 2 with old -> new; --resume never and required")
def changed(box: Box) -> None:
    out = box.out()
    killed(box, out, 3)
    other = list(WORDS)
    other[other.index("int4-g16-z")] = "int3-g16-z"
    base = ("compress", deep(box), "--out", out)
    box.run(*base, *other).be(2, "int4-g16-z", "int3-g16-z", "->")
    box.run(*base, *WORDS, "--seed", "5").be(2, "seed", "0 -> 5")
    box.run(*base, *WORDS, "--resume", "never").be(2, "unfinished run")
    box.run(*base[:3], box.out(), *WORDS, "--resume", "required").be(2, "no unfinished run")


@case(25, "resume state damaged", "found by hash: an older state, or code 6 with what to delete")
def damaged(box: Box) -> None:
    expected = whole(box)
    out = box.out()
    killed(box, out, 4)
    kept = box.root / "kept"
    shutil.copytree(work(out), kept)
    places = [path for path in kept.rglob("*") if path.is_file() and "work" not in path.parts]
    skipped = ("aptq-run", "lock", "log.jsonl", "recipe.toml", "plan.json")
    objects = [p.relative_to(kept) for p in sorted(places) if p.name not in skipped]
    assert objects, places
    draw = random.Random(3)
    for name in draw.sample(objects, 3) + [o for o in objects if o.name.lower() == "current"]:
        shutil.rmtree(work(out), ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, work(out))
        data = bytearray((work(out) / name).read_bytes())
        if data:
            data[draw.randrange(len(data))] ^= 16
        (work(out) / name).write_bytes(data)
        seen = box.run("compress", deep(box), "--out", out, *WORDS)
        assert seen.code in (0, 6), (str(name), seen.short())
        if seen.code == 6:
            assert "remove" in seen.text, seen.short()
        else:
            same = hashes(out)
            assert same.keys() == expected.keys()
            box.run("verify", out).be(0)


@case(26, "output folder taken, read-only, the input, a file, used twice", "code 2, lock with pid")
def folders(box: Box) -> None:
    folder = box.model()
    (box.root / "taken").mkdir()
    (box.root / "taken" / "file").write_text("here")
    box.run("compress", folder, "--out", box.root / "taken", *RTN).be(2, "is not empty")
    box.run("compress", folder, "--out", folder, *RTN).be(2, "output and input are the same")
    box.run("compress", folder, "--out", box.root / "taken" / "file", *RTN).be(2, "is a file")
    below = box.root / "taken" / "file" / "x"
    box.run("compress", folder, "--out", below, *RTN).be(2)
    box.run("compress", folder, "--out", box.root / "größe 漢字 x", *RTN).be(0)
    out = box.out()
    process = box.process("compress", deep(box), "--out", out, *WORDS)
    while process.poll() is None and finished(out) < 1:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    box.run("compress", deep(box), "--out", out, *WORDS).be(2, "at work", str(process.pid))
    process.send_signal(signal.SIGCONT)
    box.ended(process).be(0)


@case(27, "out of memory", "plan tells the need; less at a time, then code 4 with the state kept")
def memory(box: Box) -> None:
    folder = deep(box)
    box.run("plan", folder, "--grid", "int4-g16-z", "--recipe", "gptq").be(0, "to compress: memory")
    real, broken = Stream.advance, [2]

    def short(self: Stream, index: int, block: torch.nn.Module) -> None:
        if index == 3 and broken[0] > 0:
            broken[0] -= 1
            raise MemoryError("not so much")
        real(self, index, block)

    out = box.out()
    with patch.object(Stream, "advance", short):
        box.run("compress", folder, "--out", out, *WORDS).be(0, "memory ran out")
        assert out.is_dir()
        broken[0] = 1000
        out = box.out()
        box.run("compress", folder, "--out", out, *WORDS).be(4, "not enough memory")
    assert work(out).is_dir()
    assert not out.exists()
    box.run("compress", folder, "--out", out, *WORDS).be(0)


@case(30, "interrupts, threads, versions, devices", "75, then 130; bounded change; clear lines")
def interrupts(box: Box) -> None:
    expected, out = whole(box), box.out()
    killed(box, out, 2, signal.SIGINT)
    box.last.be(75, "stopping after this block")
    box.ended(box.process("compress", deep(box), "--out", out, *WORDS)).be(0)
    assert hashes(out) == expected
    for wait in (0.02, 0.15, 0.2):  # while it works, or while Python shuts down
        out = box.out()
        process = box.process("compress", deep(box), "--out", out, *WORDS)
        while process.poll() is None and finished(out) < 2:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        seen = box.ended(process)
        assert seen.code in (75, 130), f"code {seen.code}: {seen.short()}"
    one = box.out()
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    box.ended(box.process("compress", deep(box), "--out", one, *WORDS, **threads)).be(0)
    ids = torch.arange(64)[None]
    many = load(box.models / "whole-run", kernel="reference")(ids).logits
    few = load(one, kernel="reference")(ids).logits
    assert float((few - many).norm() / many.norm()) < 0.05
    if not torch.cuda.is_available():
        box.compress(box.model(), "--device", "cuda").be(2, "no device 'cuda'")
    with patch.dict(SUPPORTED, {"transformers": ((99,), (100,))}):
        box.compress(box.model()).be(2, "transformers", "99")
    (box.root / "rows.parquet").write_bytes(b"PAR1")
    with patch.dict("sys.modules", {"pyarrow": None}):
        words = ("--data", box.root / "rows.parquet")
        box.compress(box.model(), *words, how=GPTQ).be(2, "pip install pyarrow")
