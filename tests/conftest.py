"""Keeps every test on one thread, with the same random numbers, and without what a test before it left behind."""

from __future__ import annotations

import logging
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


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Puts logging back after a test in which a run has set it up."""
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield
    for handler in logging.getLogger().handlers:
        if handler not in handlers:
            handler.close()
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)
    logging.captureWarnings(False)
