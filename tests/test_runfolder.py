"""RunFolder: a run appears whole under its name or not at all."""

import shutil
from pathlib import Path

import pytest

from aptq.failures import Shortage
from aptq.runfolder import MARK, RunFolder


def test_published_run_is_whole(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "deep" / "run", "source") as run:
        (run.work / "states").touch()
        run.log("start", {"value": 1})
        run.log("done", {})
        assert not (tmp_path / "deep" / "run").exists()
        run.publish()
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["run"]
    names = sorted(path.name for path in (tmp_path / "deep" / "run").iterdir())
    assert names == ["checkpoint", "log.jsonl"]
    text = (tmp_path / "deep" / "run" / "log.jsonl").read_text()
    assert text == '{"event": "start", "value": 1}\n{"event": "done"}\n'


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), RunFolder(tmp_path / "run", "source"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_rest_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / MARK).touch()
    (tmp_path / "run.partial" / "old").touch()
    with RunFolder(tmp_path / "run", "source") as run:
        assert not (run.path / "old").exists()
        run.publish()


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    with (
        pytest.raises(ValueError, match="the work folder is taken"),
        RunFolder(tmp_path / "run", "source"),
    ):
        pass
    assert (tmp_path / "run.partial").is_dir()


def test_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run", "source") as run:
        run.publish()
    assert (tmp_path / "run" / "checkpoint").is_dir()


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="cannot be made"),
        RunFolder(tmp_path / "file" / "run", "source"),
    ):
        pass


def test_source_is_never_the_output(tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="the same"):
        RunFolder(tmp_path / "other", str(tmp_path))


def test_reserve_counts_free_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with RunFolder(tmp_path / "run", "source") as run:
        run.reserve(1000)
        with pytest.raises(Shortage, match="1,101 bytes needed, 1,100 free"):
            run.reserve(1001)
