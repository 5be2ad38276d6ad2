"""Seeds, saves and restores the random generators of Python, NumPy and torch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xxhash


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seeds every generator of this process, each rank's differently, as OpenCLIP's trainer does."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def seed_of(text: str) -> int:
    """Returns a seed of 64 bits that is a function of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Seeds the CPU generators from a text, and puts their states back afterwards.

    That takes some 100 microseconds; what draws from torch alone may take a `torch.Generator` with `seed_of` the text.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = seed_of(text)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which queues a call for CUDA every time
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def generator_of(*what: object) -> random.Random:
    """Returns a generator that is a function of what is named: seed, epoch, sample key and purpose."""
    return random.Random(xxhash.xxh3_64_intdigest(" ".join(map(str, what)).encode("utf-8", "surrogatepass")))


def random_state() -> dict[str, Any]:
    """Returns the states of all generators, as tensors and plain values that ``weights_only`` loading admits."""
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
