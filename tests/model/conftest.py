"""Tiny models on disk, made once a session."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit-equality is promised for one number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family -> its saved tiny model, in float32."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else tiny_model(name, root)

    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A fresh copy of the tiny Llama that a test may damage."""
    return tiny_model("llama", tmp_path)
