"""Small compressions in child processes that die at chosen steps; one server forks them all.

Importing torch takes longer than a job, so a server imports it once and forks a child for each
request (`python -m tests.killing`, one JSON object a line).  A step is a call that makes something
durable: fsync, rename, truncate.  `Server` is the other end.
"""

import contextlib
import errno
import faulthandler
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 120  # seconds of a child, which then ends with code 1 and its traceback
ROOT = Path(__file__).parents[1]
SMALL = "[data]\nsamples = 6\nlength = 16\nwritten = {written}\n"
GRIDS = "grids = ['int2-g16-z', 'int3-g16-z', 'int4-g16-z', 'bf16']\n"
MEASURED = "nats = true\n[allocate]\nuse = 'milp'\n[measure]\nuse = 'error'\n"
# recipes by the way they need to be kept: what a block depends on besides its predecessors
RECIPES = {
    "plain": GRIDS + SMALL + "[[stage]]\nuse = 'gptq'\n",
    "large": GRIDS
    + SMALL.replace("6", "400", 1).replace("16", "128", 1)
    + "[[stage]]\nuse = 'gptq'\n",
    "blind": GRIDS + SMALL + "[[stage]]\nuse = 'rtn'\n",
    "mixed": GRIDS + MEASURED + SMALL + "[[stage]]\nuse = 'gptq'\n",
    "profiled": GRIDS
    + SMALL
    + "[[stage]]\nuse = 'gptq'\n[[stage]]\nuse = 'autoround'\nsteps = 3\nrows = 'gradient'\n",
    "windows": GRIDS
    + SMALL
    + "[[stage]]\nuse = 'gptq'\n[[stage]]\nuse = 'cbq'\nsteps = 3\nblocks = 2\nnorms = 1e-3\n",
    "folded": GRIDS + SMALL + "[[stage]]\nuse = 'omniquant'\nsteps = 3\nblocks = 2\n",
    "whole": GRIDS
    + SMALL
    + "[[stage]]\nuse = 'autoround'\nsteps = 3\nnorms = 1e-3\n"
    + "[[stage]]\nuse = 'e2e_qp'\nsteps = 3\nbatch = 2\n",
    "outer": "outer = true\n"
    + GRIDS
    + MEASURED.replace("nats = true\n", "").replace("error", "fisher")
    + SMALL
    + "[[stage]]\nuse = 'gptq'\n",
}


def recipe(name: str, folder: Path) -> Path:
    """The recipe as a file; that for the whole model also lets it write windows."""
    path = folder / f"{name}.toml"
    path.write_text(RECIPES[name].replace("{written}", "1" if name == "whole" else "0"))
    return path


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of all that a run promises to be the same each time."""
    files = [*run.glob("**/checkpoint/*"), *run.glob("**/plan.json"), *run.glob("**/scores.json")]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


class Server:
    """A process that runs requests in children; a context manager.

    disk: (folder, bytes) of a small disk that only the server sees, where the system allows it.
    """

    def __init__(self, disk: tuple[Path, int] | None = None) -> None:
        self.disk = disk

    def __enter__(self) -> "Server":
        words = [sys.executable, "-m", "tests.killing"]
        if self.disk is not None:
            mount = f"mount -t tmpfs -o size={self.disk[1]} none '{self.disk[0]}'"
            words = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, env=env, text=True, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self, *words: str | Path, **how: Any) -> dict[str, Any]:
        """Run `aptq words`; {"code", "output", "seconds", "steps", "times" of these, "blocks"}.

        The code of a child that was killed is -9.

        store: are hidden states stored (else computed again), whatever is cheaper;
        kill, full, ask: number of the step at which the child is killed, the disk is full or
        SIGTERM comes (twice with again); short: numbers of those at which memory runs out; at,
        after: it is killed so many seconds after a step, wherever it is; tight, memory: number of
        a step, and bytes of address space that it may take from there on besides what it has; file:
        bytes of a file at most; fill: folder of a small disk that is filled at step `full` instead;
        remove: a file to delete before; threads: of torch; hash: run whose `hashes` are wanted.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"words": [str(word) for word in words], **how}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise OSError("the server could not start")
        found: dict[str, Any] = json.loads(line)
        return found


def serve() -> None:
    """Answer requests until there are none."""
    import torch

    import aptq.cli
    import aptq.pipeline
    import aptq.preflight
    import aptq.terminal  # noqa: F401

    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer.write(json.dumps(_run(request)) + "\n")
        answer.flush()


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a child for one request and wait for it."""
    if "remove" in request:
        Path(request["remove"]).unlink()
    inner, outer = os.pipe()
    began = request["began"] = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(inner)
        os._exit(_child(request, os.fdopen(outer, "w", buffering=1)))
    os.close(outer)
    lines: list[dict[str, Any]] = []
    with os.fdopen(inner) as told:
        for text in told:
            lines.append(json.loads(text))
            if "step" in lines[-1] and sum("step" in x for x in lines) == request.get("at"):
                time.sleep(request["after"])
                os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found: dict[str, Any] = {"code": code, "seconds": time.perf_counter() - began}
    for key in ("step", "time", "block", "output"):
        found[f"{key}s"] = [line[key] for line in lines if key in line]
    if "hash" in request:
        found["hashes"] = hashes(Path(request["hash"]))
    return {**found, "output": "".join(found.pop("outputs"))}


def _fill(path: Path) -> None:
    """Use up all that is left of a small disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _child(request: dict[str, Any], told: io.TextIOBase) -> int:
    def tell(**what: object) -> None:
        told.write(json.dumps(what) + "\n")

    from aptq.cli import app

    if "threads" in request:
        import torch

        torch.set_num_threads(request["threads"])
    _watch(request, tell)
    faulthandler.dump_traceback_later(request.get("limit", LIMIT), exit=True)
    if "file" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file"],) * 2)
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
            app(request["words"])
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        tell(output=text.getvalue())


def _watch(request: dict[str, Any], tell: Callable[..., None]) -> None:
    """Count steps and blocks; let the chosen step go wrong."""
    from aptq import making
    from aptq.making import _Making

    if "store" in request:
        making.stores = lambda *_: request["store"]
    walked = _Making._walked
    names: list[str] = []

    def block(self: Any, found: Any) -> None:
        tell(block=found.index)
        walked(self, found)

    def step(kind: str, path: str) -> None:
        names.append(f"{kind} {path}")
        tell(step=names[-1], time=time.perf_counter() - request["began"])
        if len(names) == request.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if len(names) == request.get("ask"):
            os.kill(os.getpid(), signal.SIGTERM)
            if request.get("again"):
                os.kill(os.getpid(), signal.SIGTERM)
        if len(names) == request.get("tight"):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + request["memory"],) * 2)
        if len(names) in request.get("short", ()):
            raise MemoryError("cannot allocate memory")
        if len(names) == request.get("full") and "fill" in request:
            _fill(Path(request["fill"]) / "filler")
        elif len(names) == request.get("full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def wrapped(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            step(kind, Path(place).name)
            return real(first, *rest)

        return call

    _Making._walked = block  # type: ignore[method-assign]
    for kind in ("fsync", "truncate"):
        setattr(os, kind, wrapped(kind, getattr(os, kind)))
    for kind in ("replace", "rename"):
        setattr(Path, kind, wrapped(kind, getattr(Path, kind)))


if __name__ == "__main__":
    serve()
