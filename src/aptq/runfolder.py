"""The run folder while it grows: all is written below `<out>.partial` and renamed at the end.

recipe.toml scores.json plan.json log.jsonl identity.json README.md eval.json checkpoint/, and
until the end work/ with hidden states and with the journal that an interrupted run goes on from.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from aptq.failures import Shortage, scarce
from aptq.store.manifest import read_json
from aptq.store.objects import FOLDER, LOG, Journal, sync
from aptq.store.resume import Identity, Lock, Resume

MARK = "aptq-run"  # file that tells an unfinished run from a folder of the user's
LOCK, IDENTITY = "lock", "identity.json"


class RunFolder:
    """Context manager: on success the run stands under its final name.

    Where it fails before anything was worth keeping, or by a mistake of the user's, nothing is
    left; else the work stays below `<out>.partial` and the same command goes on (`resumed`).
    `resume`: "never" refuses such work, "required" its absence.  Raises ValueError if `out` is
    taken, is the source, cannot be written or is being written; Corrupt if the work is damaged.
    """

    def __init__(self, out: Path, source: str, resume: Resume = "auto") -> None:
        self.out, self.resume = out, resume
        self.path = out.with_name(out.name + ".partial")
        self.checkpoint = self.path / "checkpoint"
        self.work = self.path / "work"  # hidden states and journal; gone when it is published
        self.state = Journal(self.path)
        self.resumed, self.needed = False, 0
        _check(out, Path(source))

    def __enter__(self) -> Self:
        fresh = not self.path.exists()
        if not fresh and not (self.path / MARK).is_file():
            _refuse("the work folder is taken", str(self.path), "remove or rename it")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / MARK).touch()
            self.lock = Lock(self.path / LOCK)
        except OSError as error:
            raise ValueError(
                f"the output folder cannot be made\n{self.path}: {error.strerror}\n"
                f"choose another --out"
            ) from error
        try:
            self._begin()
        except BaseException:
            if fresh:
                shutil.rmtree(self.path, ignore_errors=True)
            self.lock.release()
            raise
        return self

    def _begin(self) -> None:
        """Take over what an interrupted run has left, or an empty folder."""
        _check(self.out, self.path)  # nobody has published meanwhile
        self.resumed = self.state.load()
        if self.resumed and self.resume == "never":
            _refuse("an unfinished run is here", str(self.path), "remove it, or let it be resumed")
        if not self.resumed and self.resume == "required":
            _refuse("there is no unfinished run", str(self.path), "leave out --resume required")
        kept = {self.path / MARK, self.path / LOCK}
        if self.resumed:
            kept |= {self.path / LOG, self.checkpoint, self.work, self.path / FOLDER}
        for entry in [*self.work.glob("*"), *self.path.iterdir()]:
            if entry not in kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.work.mkdir(exist_ok=True)
        self.checkpoint.mkdir(exist_ok=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.path.exists():  # it was published
            self.lock.release()
            return
        mistake = isinstance(error, ValueError) and not isinstance(error, Shortage)
        kept = bool(self.state.heads) and (self.resumed or not mistake)
        what = scarce(error)
        free = shutil.disk_usage(self.path).free if what else 0
        if error is not None and not kept:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()
        if what is not None:
            again = "give the same command again: it goes on" if kept else "try again"
            raise Shortage(
                f"there is not enough {what}\n{self.path}: {free:,} bytes of disk free, the run "
                f"needs {self.needed:,}; {' '.join(str(error).split())[:200]}\n"
                f"free some {what}, then {again}"
            ) from error

    def identify(self, identity: Identity) -> list[str]:
        """Begin as, or go on as, what has this identity; differences that need a warning.

        Raises ValueError if the unfinished run has another one.
        """
        old = self.state.values.get("identity")
        told = [] if old is None else identity.check(old, self.path)
        self.state.values["identity"] = asdict(identity)
        if old is not None:
            self.log("resumed", {"changed": told})
        return told

    @property
    def whole(self) -> bool | None:
        """Does the unfinished run know its source's weights by SHA-256?  None if there is none."""
        source = self.state.values.get("identity", {}).get("source")
        return None if source is None else not any(" bytes of " in x for x in source.values())

    def reserve(self, nbytes: int) -> None:
        """Raise Shortage unless the disk has room for `nbytes` and a tenth more, with what lies
        here already.
        """
        self.needed = nbytes
        folders = (self.checkpoint, self.path / FOLDER)
        there = sum(file.stat().st_size for folder in folders for file in folder.glob("*"))
        reserve(self.path, max(nbytes - there, 0))

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one line to log.jsonl."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def publish(self) -> None:
        """Give the finished run its final name."""
        if identity := self.state.values.get("identity"):
            (self.path / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n", "utf-8")
        for path in (*self.path.iterdir(), self.path):
            sync(path)
        if self.out.exists():
            self.out.rmdir()  # empty, or _check had refused it
        self.path.rename(self.out)  # before anything is removed: it is whole, here or there
        sync(self.out.parent)  # the rename itself survives a power cut
        shutil.rmtree(self.out / "work")
        for name in (MARK, LOCK):
            (self.out / name).unlink()

    def discard(self) -> None:
        """Remove the folder: what was wanted is elsewhere."""
        shutil.rmtree(self.path)


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


def unfinished(paths: Sequence[Path], resume: Resume) -> list[Path]:
    """Those of several run folders that an interrupted call has not published; else all of them."""
    left = [path for path in paths if not (path / IDENTITY).is_file()]
    return left if 0 < len(left) < len(paths) and resume != "never" else list(paths)


def check_finished(out: Path, identity: Identity) -> list[str]:
    """Differences of a published run that need a warning.  Raises as `RunFolder.identify`."""
    return identity.check(read_json(out / IDENTITY), out)


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
