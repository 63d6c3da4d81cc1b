"""Tables and figures in documents are those of the committed results."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = ("README.md", "docs/log.md", "docs/engines.md", "docs/results.md")
NOISE = 1.01  # two runs of one recipe differ by up to 0.5 %, each of two rows


def script(name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_tables_are_current() -> None:
    done = script("tables.py", "--check", *TABLES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_are_current() -> None:
    """Another matplotlib would write other bytes."""
    pinned = re.findall(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    try:
        found = metadata.version("matplotlib")
    except metadata.PackageNotFoundError:
        pytest.skip("needs matplotlib")
    if [found] != pinned:
        pytest.skip(f"needs matplotlib {pinned[0]}, {found} is here")
    done = script("figures.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_joint_plans_are_the_lower_envelope() -> None:
    """No row of `parts` that takes no more bytes has less perplexity, but for noise."""
    done = script("figures.py", "--shares")
    assert done.returncode == 0, done.stderr
    found = [float(share) for share in re.findall(r"\d\.\d{3}(?= on )", done.stdout)]
    assert len(found) == 8
    assert max(found) < NOISE


def test_figures_are_small_and_shown() -> None:
    page = (ROOT / "docs/results.md").read_text("utf-8")
    for figure in sorted((ROOT / "docs/figures").glob("*")):
        assert figure.suffix == ".svg"
        assert 5_000 < figure.stat().st_size < 60_000, figure.name
        assert f"](figures/{figure.name})" in page, figure.name
        assert "<text" in figure.read_text("utf-8")  # letters, not outlines
