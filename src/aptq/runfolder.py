"""The run folder while it grows: all is written below `<out>.partial` and renamed at the end.

recipe.toml scores.json plan.json log.jsonl README.md eval.json checkpoint/
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from aptq.failures import Shortage

MARK = "aptq-run"  # file that tells an unfinished run from a folder of the user's


class RunFolder:
    """Context manager: on success the run stands under its final name, on failure nothing is left.

    Raises ValueError if `out` is taken, is the source, or cannot be written.
    """

    def __init__(self, out: Path, source: str) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self.checkpoint = self.path / "checkpoint"
        self.work = self.path / "work"  # hidden states; gone when the run is published
        _check(out, Path(source))

    def __enter__(self) -> Self:
        if self.path.exists():
            if not (self.path / MARK).is_file():
                _refuse("the work folder is taken", str(self.path), "remove or rename it")
            shutil.rmtree(self.path)  # of a run that was killed
        try:
            self.work.mkdir(parents=True)
            (self.path / MARK).touch()
            self.checkpoint.mkdir()
        except OSError as error:
            raise ValueError(
                f"the output folder cannot be made\n{self.path}: {error.strerror}\n"
                f"choose another --out"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def reserve(self, nbytes: int) -> None:
        """Raise Shortage unless the disk has room for `nbytes` and a tenth more."""
        reserve(self.path, nbytes)

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def publish(self) -> None:
        """Give the finished run its final name."""
        shutil.rmtree(self.work)
        (self.path / MARK).unlink()
        if self.out.exists():
            self.out.rmdir()  # empty, or __init__ had refused it
        self.path.rename(self.out)
        parent = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(parent)  # the rename itself survives a power cut
        finally:
            os.close(parent)


def reserve(folder: Path, nbytes: int) -> None:
    """Raise Shortage unless the disk of `folder` has room for `nbytes` and a tenth more."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * nbytes:
        raise Shortage(
            f"the disk is too full\n{folder}: {int(1.1 * nbytes):,} bytes needed, "
            f"{free:,} free\nfree some space or choose another --out"
        )


def budget_folder(out: Path, budget: str, *, alone: bool) -> Path:
    """Where the run of a budget goes: `out` itself, or of several budgets "3.5bpw" below it."""
    return out if alone else out / re.sub(r"[^A-Za-z0-9.]+", "-", budget).strip("-")


def _check(out: Path, source: Path) -> None:
    if source.exists() and out.resolve() == source.resolve():
        _refuse("output and input are the same", str(out), "choose another --out")
    if out.exists() and not out.is_dir():
        _refuse("the output is a file", str(out), "choose another --out")
    if out.exists() and any(out.iterdir()):
        count = sum(1 for _ in out.iterdir())
        where = f"{out}: {count} entries"
        _refuse("the output folder is not empty", where, "remove it or choose another --out")


def _refuse(what: str, where: str, instead: str) -> NoReturn:
    raise ValueError(f"{what}\n{where}\n{instead}")
