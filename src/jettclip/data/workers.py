"""Runs a data set in loader processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from multiprocessing import ProcessError
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from jettclip.data.counts import DataError

T = TypeVar("T")


def run_workers(dataset: IterableDataset[T], workers: int) -> Iterator[T]:
    """Yields what a data set yields in each of some loader processes; with 0 of them, in this one.

    Raises:
        DataError: if the data set does, with the same message.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_stay_quiet_when_left,
    )
    try:
        yield from loader
    except DataError as error:  # from a worker, torch hands it on with the traceback as its message
        message = str(error).rpartition("DataError: ")[2].strip()
        # this traceback is in a cycle with torch's iterator, whose workers would linger on for seconds each
        raise DataError(message) from error.with_traceback(None)


def _stay_quiet_when_left(worker: int) -> None:
    """Keeps a loader process from printing that an interrupted main process hung up while it was handing on a tensor.

    Errors of the data set itself travel to the main process, and are not printed here.
    """
    show = sys.excepthook

    def show_others(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (EOFError, OSError, ProcessError)):
            show(kind, error, trace)

    sys.excepthook = show_others
