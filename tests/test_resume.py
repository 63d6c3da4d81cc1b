"""Interrupted runs go on: same bytes as without the interruption, at most one block done again."""

import json
import os
import platform
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aptq import pipeline
from aptq.recipe import Recipe
from aptq.runfolder import RunFolder
from aptq.store.checkpoint import Checkpoint
from tests.killing import RECIPES, ROOT, Server, hashes, recipe
from tests.tiny import TINY, _config, tiny_model

SIZE = ["--budget", "3.5bpw"]
Job = Callable[..., list[str | Path]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "deep", lambda: _config("llama", num_hidden_layers=3))
        return tiny_model("deep", folder)


@pytest.fixture(scope="module")
def job(model: Path, folder: Path) -> Job:
    """The words of a command that compresses by a recipe of the table into a folder."""

    def words(name: str, out: Path, *more: str) -> list[str | Path]:
        return ["compress", model, "--out", out, "--recipe", recipe(name, folder), *SIZE, *more]

    return words


@pytest.fixture(scope="module")
def whole(server: Server, job: Job, folder: Path) -> Callable[[str], dict[str, Any]]:
    """The answer to an uninterrupted run of a recipe, with its hashes; made once."""
    made: dict[tuple[str, bool], dict[str, Any]] = {}

    def get(name: str, store: bool = False) -> dict[str, Any]:
        if (name, store) not in made:
            out = folder / f"whole-{name}{'-stored' * store}"
            made[name, store] = server.ask(*job(name, out), hash=str(out), store=store)
            assert made[name, store]["code"] == 0, made[name, store]["output"]
        return made[name, store]

    return get


def steps(answer: dict[str, Any], *names: str) -> list[int]:
    """Numbers of the steps: for each name that of the first one behind the last that matches."""
    found, last = [], 0
    for name in names:
        last += next(n for n, step in enumerate(answer["steps"][last:], 1) if re.search(name, step))
        found.append(last)
    return found


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


NAMED = ("fsync model-00002", "replace CURRENT", "replace model-00004", "aptq.json", "^rename")


@pytest.mark.parametrize("store", [True, False], ids=["stored", "again"])
@pytest.mark.parametrize("name", ["plain", "windows", "whole", "outer"])
def test_killed_at_a_step(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path, name: str, store: bool
) -> None:
    """Each recipe in the middle of the walk and at its end; the plain one at every kind of step."""
    full = whole(name, store)
    places = ["replace model-00002" if store else "00003"]
    if name == "plain" and store:
        places = list(NAMED)
    if name == "whole" and store:
        places = ["replace CURRENT", "replace model-00003"]  # blocks wait, shards are written
    for place in steps(full, *places):
        out = tmp_path / f"{place}"
        killed = server.ask(*job(name, out), kill=place, store=store)
        assert killed["code"] == -9
        done = server.ask(*job(name, out), store=store)
        assert done["code"] == 0, done["output"]
        assert hashes(out) == full["hashes"], full["steps"][place - 1]
        twice = Counter(killed["blocks"] + done["blocks"])
        assert sum(twice.values()) - len(twice) <= (2 if name == "windows" else 1), twice
        kinds = Counter((e["event"], e.get("name")) for e in events(out) if e["event"] == "layer")
        assert set(kinds.values()) == {1}, kinds
        assert [e["block"] for e in events(out) if e["event"] == "block"] == [0, 1, 2]
        assert not (out / "work").exists()


@pytest.mark.parametrize("name", ["mixed", "profiled", "folded", "blind"])
def test_killed_in_the_second_half(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    full, out = whole(name, True), tmp_path / "run"
    (place,) = steps(full, "fsync model-00003")
    assert server.ask(*job(name, out), kill=place, store=True)["code"] == -9
    done = server.ask(*job(name, out), store=True)
    assert done["code"] == 0, done["output"]
    assert hashes(out) == full["hashes"]
    assert done["blocks"] != [0, 1, 2]


def test_killed_at_random_moments(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path
) -> None:
    full, seed = whole("plain"), random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for number in range(10):
        out = tmp_path / f"{number}"
        at, after = generator.randint(1, len(full["steps"])), generator.uniform(0, 0.05)
        killed = server.ask(*job("plain", out), at=at, after=after)
        assert killed["code"] in (0, -9)  # it may have been faster
        if not out.exists():
            done = server.ask(*job("plain", out))
            assert done["code"] == 0, done["output"]
            assert len({*killed["blocks"]} & {*done["blocks"]}) <= 1
        assert hashes(out) == full["hashes"], seed


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "gpt_neox", "phi3", "deepseek_v3"])
def test_every_architecture(server: Server, tmp_path: Path, family: str) -> None:
    """Fused, tied, routed: recomputed streams go through blocks that were put back."""
    source = tiny_model(family, tmp_path, torch.bfloat16)
    words: list[str | Path] = ["compress", source, *SIZE]
    words += ["--recipe", recipe("windows" if family == "phi3" else "plain", tmp_path)]
    full = server.ask(*words, "--out", tmp_path / "a", hash=str(tmp_path / "a"))
    assert full["code"] == 0, full["output"]
    (place,) = steps(full, "fsync model-00002")
    assert server.ask(*words, "--out", tmp_path / "b", kill=place, store=False)["code"] == -9
    assert server.ask(*words, "--out", tmp_path / "b", store=False)["code"] == 0
    assert hashes(tmp_path / "b") == full["hashes"]


def test_full_disk_keeps_the_work(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path
) -> None:
    full, out = whole("plain"), tmp_path / "run"
    for place in steps(full, "fsync model-00002", "fsync model-00003"):
        failed = server.ask(*job("plain", out), full=place)
        assert failed["code"] == 4, failed["output"]
        for words in ("there is not enough disk", "bytes of disk free", "it goes on"):
            assert words in failed["output"]
        assert not out.exists()
    limited = server.ask(*job("plain", out), file=20_000)  # less than a shard
    assert limited["code"] == 4, limited["output"]
    done = server.ask(*job("plain", out))
    assert (done["code"], hashes(out)) == (0, full["hashes"])


def test_a_disk_that_is_really_full(job: Job, whole: Callable[..., Any], tmp_path: Path) -> None:
    full, disk = whole("plain"), tmp_path / "disk"
    disk.mkdir()
    out = disk / "run"
    (place,) = steps(full, "fsync model-00002")
    try:
        with Server((disk, 8 << 20)) as small:
            failed = small.ask(*job("plain", out), full=place, fill=str(disk))
            assert failed["code"] == 4, failed["output"]
            assert "not enough disk" in failed["output"]
            failed = small.ask(*job("plain", out))  # nobody has made room
            assert failed["code"] == 4, failed["output"]
            small.ask("info", disk / "none", remove=str(disk / "filler"))
            done = small.ask(*job("plain", out), hash=str(out))
            assert (done["code"], done["hashes"]) == (0, full["hashes"]), done["output"]
    except OSError:
        pytest.skip("no small disk can be mounted here")


def test_too_little_memory_keeps_the_work(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path
) -> None:
    """Hidden states of 10 MB where 2 MB are left: refused by the kernel, at the start and later."""
    full, out = whole("large"), tmp_path / "run"
    (place,) = steps(full, "fsync model-00001")
    failed = server.ask(*job("large", out), tight=1, memory=2 << 20)
    assert failed["code"] == 4, failed["output"]
    assert "there is not enough memory" in failed["output"]
    assert "going on with 1 windows at once, disk" in failed["output"]
    assert not out.exists()
    code = server.ask(*job("large", out), tight=place, memory=1 << 20)["code"]
    assert code in (0, 4)
    assert code == 0 or server.ask(*job("large", out))["code"] == 0
    if not any(event["event"] == "relieved" for event in events(out)):
        assert hashes(out) == full["hashes"]


def test_memory_that_runs_out_is_used_better(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path
) -> None:
    full, out = whole("plain"), tmp_path / "run"
    (place,) = steps(full, "fsync model-00002")
    done = server.ask(*job("plain", out), short=[place])
    assert done["code"] == 0, done["output"]
    assert "going on with 3 windows at once" in done["output"]
    assert [e["batch"] for e in events(out) if e["event"] == "relieved"] == [3]
    assert Counter(done["blocks"]) == {0: 1, 1: 2, 2: 1}
    layers = Counter(e["name"] for e in events(out) if e["event"] == "layer")
    assert set(layers.values()) == {1}
    out = tmp_path / "never"
    failed = server.ask(*job("plain", out), short=[*range(place, 1000)])
    assert failed["code"] == 4, failed["output"]
    assert "not enough memory" in failed["output"]
    assert server.ask(*job("plain", out))["code"] == 0
    assert hashes(out) == full["hashes"]  # with enough memory as it would have been


def test_stopped_politely_and_at_once(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path
) -> None:
    full, out = whole("plain"), tmp_path / "run"
    (place,) = steps(full, "fsync model-00001")
    stopped = server.ask(*job("plain", out), ask=place)
    assert stopped["code"] == 75, stopped["output"]
    assert "give the same command to go on" in stopped["output"]
    assert stopped["blocks"] == [0]
    (place,) = steps(full, "fsync model-00003")
    stopped = server.ask(*job("plain", out), ask=10, again=True)
    assert stopped["code"] == 130, stopped["output"]
    done = server.ask(*job("plain", out))
    assert (done["code"], done["blocks"]) == (0, [1, 2])
    assert hashes(out) == full["hashes"]


def test_measuring_is_not_repeated(
    server: Server, job: Job, whole: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    full, out = whole("mixed"), tmp_path / "run"
    table, scores = steps(full, "replace CURRENT", "replace CURRENT")
    assert server.ask(*job("mixed", out), kill=scores + 5)["code"] == -9
    done = server.ask(*job("mixed", out))
    assert (done["code"], hashes(out)) == (0, full["hashes"])
    assert "fit nats" not in done["output"]
    assert "measure" not in done["output"].split("calibration")[1].split("plan:")[0]
    words = ["measure", model, "--out", tmp_path / "s.json"]
    words += ["--recipe", recipe("mixed", tmp_path)]
    assert server.ask(*words, kill=table)["code"] == -9
    assert [path.name for path in tmp_path.glob("s.json*")] == ["s.json.partial"]
    done = server.ask(*words)
    assert done["code"] == 0, done["output"]
    assert (tmp_path / "s.json").read_bytes() == (out / "scores.json").read_bytes()
    assert not (tmp_path / "s.json.partial").exists()


def test_several_budgets(server: Server, job: Job, tmp_path: Path) -> None:
    words = [*job("outer", tmp_path / "a")[:-1], "3.5bpw,4.5bpw"]
    full = server.ask(*words, hash=str(tmp_path / "a"))
    assert full["code"] == 0, full["output"]
    words[3] = tmp_path / "b"
    second = steps(full, "^rename 3.5bpw", "fsync model-00002")[1]
    assert server.ask(*words, kill=second)["code"] == -9
    assert (tmp_path / "b" / "3.5bpw").is_dir()
    again = server.ask(*words, "--seed", "1")
    assert (again["code"], "recipe.seed: 0 -> 1" in again["output"]) == (2, True), again["output"]
    done = server.ask(*words)
    assert done["code"] == 0, done["output"]
    assert hashes(tmp_path / "b") == full["hashes"]
    assert done["blocks"] == [1, 2]


@pytest.fixture
def begun(server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path) -> Path:
    """The output of a run that was killed after two of three blocks."""
    (place,) = steps(whole("plain"), "replace model-00003")
    assert server.ask(*job("plain", tmp_path / "run"), kill=place)["code"] == -9
    return tmp_path / "run"


def test_something_else_does_not_go_on(
    server: Server, job: Job, whole: Callable[..., Any], begun: Path, model: Path
) -> None:
    """Other options, other weights, other scores; then the old ones go on after all."""
    for more, told in (
        (["--seed", "1"], "recipe.seed: 0 -> 1"),
        (["--budget", "4bpw"], "recipe.budget: 3.5bpw -> 4bpw"),
        (["--samples", "4"], "recipe.data.samples: 6 -> 4"),
        (["--resume", "never"], "an unfinished run is here"),
    ):
        refused = server.ask(*job("plain", begun, *more))
        assert (refused["code"], told in refused["output"]) == (2, True), refused["output"]
    weights = model / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    refused = server.ask(*job("plain", begun))
    assert (refused["code"], "source.model.safetensors" in refused["output"]) == (2, True)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = server.ask(*job("plain", begun, "--resume", "required"))
    assert (done["code"], hashes(begun)) == (0, whole("plain")["hashes"]), done["output"]
    lost = server.ask(*job("plain", begun.with_name("other"), "--resume", "required"))
    assert (lost["code"], "there is no unfinished run" in lost["output"]) == (2, True)
    assert not begun.with_name("other.partial").exists()


def test_verified_source(
    server: Server, job: Job, whole: Callable[..., Any], tmp_path: Path
) -> None:
    """Known by SHA-256 the weights may have been copied meanwhile, but not changed."""
    out = tmp_path / "run"
    words = job("plain", out, "--verify")
    words[1] = shutil.copytree(words[1], tmp_path / "deep")
    assert server.ask(*words, kill=30)["code"] == -9
    weights = tmp_path / "deep" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused = server.ask(*words)
    assert (refused["code"], "source.model.safetensors" in refused["output"]) == (2, True)
    data[-1] ^= 1
    weights.write_bytes(data)
    assert server.ask(*words)["code"] == 0
    assert hashes(out) == whole("plain")["hashes"]


def test_damaged_state(server: Server, job: Job, whole: Callable[..., Any], begun: Path) -> None:
    """The newest generation is damaged: the older one.  A shard is: nothing goes on."""
    partial = begun.with_name("run.partial")
    state = partial / "work" / "state"
    newest = state / (state / "CURRENT").read_text().split()[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    copy = shutil.copytree(partial, begun.with_name("copy.partial"))
    done = server.ask(*job("plain", begun))
    assert (done["code"], done["blocks"]) == (0, [1, 2]), done["output"]
    assert hashes(begun) == whole("plain")["hashes"]
    shard = copy / "checkpoint" / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    refused = server.ask(*job("plain", begun.with_name("copy")))
    assert refused["code"] == 6, refused["output"]
    assert f"remove {copy}" in refused["output"].replace("\n", " ")
    assert shard.exists()


def test_one_writer(server: Server, job: Job, model: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", str(model)) as run:
        refused = server.ask(*job("plain", tmp_path / "run"))
        assert refused["code"] == 2
        owner = f"process {os.getpid()} on {platform.node()} since"
        assert owner in " ".join(refused["output"].split()), refused["output"]
        run.discard()
    assert server.ask(*job("plain", tmp_path / "run"))["code"] == 0


def test_threads_change_little(
    server: Server, job: Job, whole: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    """Sums in another order flip codes that lie near a tie: few of them, and none by much."""
    one, out = whole("plain"), tmp_path / "run"
    done = server.ask(*job("plain", out), threads=2, hash=str(out))
    assert done["code"] == 0, done["output"]
    assert (
        server.ask(*job("plain", tmp_path / "two"), hash=str(tmp_path / "two"))["hashes"]
        == (one["hashes"])
    )
    first, second = Checkpoint.open(folder / "whole-plain"), Checkpoint.open(out)
    for name in first.plan.targets:
        weight, other = first.dense(name), second.dense(name)
        assert float((weight - other).norm() / weight.norm()) < 0.05, name


def test_global_generators_are_left_alone(model: Path, tmp_path: Path) -> None:
    """Neither read nor seeded: every draw names its generator."""
    torch.manual_seed(5)
    state, other = torch.get_rng_state(), random.getstate()
    chosen = Recipe.parse(RECIPES["windows"].replace("{written}", "0"), "windows")
    pipeline.compress(model, tmp_path / "run", recipe=chosen)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    draws = re.compile(r"torch\.(?:rand|randn|randint|randperm|multinomial|bernoulli)\w*\((.*)")
    for path in (ROOT / "src").rglob("*.py"):
        if path.name == "tuning.py":  # numbers to time kernels with
            continue
        text = path.read_text("utf-8")
        assert not re.search(r"torch\.manual_seed|np\.random|^import random", text, re.M), path
        for found in draws.finditer(text):
            assert "generator=" in text[found.start() : found.start() + 200], (path, found[0])
