"""Runs a data set in loader processes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from multiprocessing import ProcessError
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from jettclip.data.counts import DataError

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


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
        worker_init_fn=_start,
    )
    try:
        yield from loader
    except DataError as error:  # from a worker, torch hands it on with the traceback as its message
        message = str(error).rpartition("DataError: ")[2].strip()
        # this traceback is in a cycle with torch's iterator, whose workers would linger on for seconds each
        raise DataError(message) from error.with_traceback(None)


def _start(worker: int) -> None:
    settle_in()
    _stay_quiet_when_left()


def settle_in() -> None:
    """Sets a process up to read many samples.

    What came from the trainer stays with the process to its end, so that garbage collection need not walk all of it,
    for a fifth of a second each time and copying each page that it shares with the trainer.
    """
    _keep_freed_memory()
    gc.freeze()


def _keep_freed_memory() -> None:
    """Lets glibc's malloc keep what is freed for the next image, where it would give it back and fault it in again.

    Both thresholds or neither: setting one ends glibc's own adapting of the other. Those of the environment stay.
    """
    chosen = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    if platform.libc_ver()[0] == "glibc" and not chosen:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)


def _stay_quiet_when_left() -> None:
    """Keeps a loader process from printing that an interrupted main process hung up while it was handing on a tensor.

    Errors of the data set itself travel to the main process, and are not printed here.
    """
    show = sys.excepthook

    def show_others(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (EOFError, OSError, ProcessError)):
            show(kind, error, trace)

    sys.excepthook = show_others
