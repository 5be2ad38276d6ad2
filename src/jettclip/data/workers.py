"""Runs a data set in loader processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from jettclip.data.counts import DataError

T = TypeVar("T")


def run_workers(dataset: IterableDataset[T], workers: int) -> Iterator[T]:
    """Yields what a data set yields in each of some loader processes; with 0 of them, in this one.

    Raises:
        DataError: if the data set does, with the same message.
    """
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available())
    try:
        yield from loader
    except DataError as error:  # from a worker, torch hands it on with the traceback as its message
        message = str(error).rpartition("DataError: ")[2].strip()
        # this traceback is in a cycle with torch's iterator, whose workers would linger on for seconds each
        raise DataError(message) from error.with_traceback(None)
