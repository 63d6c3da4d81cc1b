"""What the cases share: small models to damage, the command line to run, and how a case is held."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aptq.cli import app
from tests.tiny import tiny_model

RTN = ("--recipe", "rtn", "--grid", "int4-g16-z")
GPTQ = ("--recipe", "gptq", "--grid", "int4-g16-z", "--samples", "4", "--length", "32")
Change = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Seen:
    """How a command ended; seconds of work, which a busy machine does not stretch."""

    code: int
    text: str
    seconds: float = 0.0

    def be(self, code: int, *words: str) -> "Seen":
        """Hold exit code and words; the traceback of a defect is never right."""
        missing = [word for word in words if word not in self.text]
        assert self.code == code, f"code {self.code} instead of {code}: {self.short()}"
        assert not missing, f"{missing} not in: {self.short()}"
        assert "Traceback" not in self.text, self.text[-400:]
        return self

    def short(self) -> str:
        """The error in one line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        at = next((i for i, line in enumerate(lines) if line.startswith("error:")), None)
        lines = lines[-1:] if at is None else lines[at : at + 3]
        return " | ".join(lines)[:230]


@dataclass
class Box:
    """The folder of one case."""

    root: Path
    models: Path
    last: Seen = field(default_factory=lambda: Seen(0, ""))

    def model(self, name: str = "llama", *, sharded: bool = False) -> Path:
        """A fresh copy of a small random model, in float32."""
        held = self.models / ("sharded" if sharded else "whole")
        if not (held / name).is_dir():
            held.mkdir(parents=True, exist_ok=True)
            tiny_model(name, held, shard_size="50KB" if sharded else "5GB")
        target = self.root / f"{name} {len(list(self.root.iterdir()))}"  # spaces are no excuse
        return Path(shutil.copytree(held / name, target))

    def out(self) -> Path:
        """A path where nothing is."""
        return self.root / f"out-{len(list(self.root.iterdir()))}"

    def run(self, *words: object) -> Seen:
        """The command line in this process."""
        began = time.process_time()
        done = CliRunner().invoke(app, [str(word) for word in words])
        self.last = Seen(done.exit_code, done.output, time.process_time() - began)
        return self.last

    def compress(self, model: Path, *words: object, how: tuple[str, ...] = RTN) -> Seen:
        """`aptq compress` into a new folder; a failure must leave nothing under the final name."""
        out = self.out()
        seen = self.run("compress", model, "--out", out, *how, *words)
        assert out.exists() == (seen.code == 0), f"{out} exists: {out.exists()}, {seen.short()}"
        return seen

    def packed(self, *words: object, how: tuple[str, ...] = RTN) -> Path:
        """A fresh run folder."""
        out = self.out()
        self.run("compress", self.model(), "--out", out, *how, *words).be(0)
        return out

    def process(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        """The command line as a process of its own."""
        command = [sys.executable, "-m", "aptq", *map(str, words)]
        pipe = subprocess.PIPE
        env = {**os.environ, **environment}
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env)

    def ended(self, process: subprocess.Popen[str], timeout: float = 120) -> Seen:
        """Wait for a process."""
        began = time.perf_counter()
        text, _ = process.communicate(timeout=timeout)
        self.last = Seen(process.returncode, text, time.perf_counter() - began)
        return self.last


class Case(NamedTuple):
    """One line of the table."""

    number: int
    name: str
    expected: str
    run: Callable[[Box], None]


CASES: dict[int, Case] = {}


def case(
    number: int, name: str, expected: str
) -> Callable[[Callable[[Box], None]], Callable[[Box], None]]:
    """File a function as the case `number`."""

    def keep(run: Callable[[Box], None]) -> Callable[[Box], None]:
        assert number not in CASES, number
        CASES[number] = Case(number, name, expected, run)
        return run

    return keep


def edit(path: Path, change: Change) -> None:
    """Change a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def configure(folder: Path, **changes: object) -> Path:
    """Change config.json."""
    edit(folder / "config.json", lambda data: data.update(changes))
    return folder


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of an unsharded model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind of a run's log."""
    lines = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def counts(out: Path) -> Mapping[str, Mapping[str, float]]:
    """What was counted for every layer of a run."""
    return {line["name"]: line["counts"] for line in events(out, "layer")}


def peak() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
