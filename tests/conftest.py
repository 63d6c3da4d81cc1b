"""One torch thread for each test process: pytest-xdist runs a process for each core."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
