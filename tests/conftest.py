"""What holds for every test: one torch thread for each process, and draws that do not depend on
which tests ran before."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # pytest-xdist runs a process for each core


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
