"""Keeps every test on one thread, with the same random numbers, and without what a test before it left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Seeds torch before each test, and puts the number of threads and the default dtype back after it."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
