"""Worker processes that do one task many times over: in order, with progress, and no longer than their parent lives."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from tqdm import tqdm

from jettclip.data.counts import DataError

T = TypeVar("T")


def run(
    make_task: Callable[[], Callable[[T], Any]], items: Iterable[T], count: int, workers: int, what: str
) -> Iterator[Any]:
    """Yields what a task, made once in every process, returns for each item, in order; shows the progress.

    Args:
        make_task: returns the task.
        items: taken only a few ahead of what is yielded, so that they need not be in memory at once.
        count: how many they are.
        workers: processes; the task is done in this one if fewer than two would have work.
        what: the name of the progress bar.

    Raises:
        DataError: if a worker process is killed.
    """
    workers = min(workers, count)
    answers = map(make_task(), items) if workers < 2 else in_processes(make_task, items, workers)
    yield from tqdm(answers, desc=what, total=count, unit="shard", disable=None)


def in_processes(make_task: Callable[[], Callable[[T], Any]], items: Iterable[T], workers: int) -> Iterator[Any]:
    """Yields what a task, made once in every one of so many processes, returns for each item, in order.

    Items are taken only a few ahead. When no more answers are wanted, tasks are told by `is_stopping`.

    Raises:
        DataError: if a worker process is killed.
    """
    stop = multiprocessing.Event()
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(make_task, stop))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_run, item))
            if len(waiting) > workers + 1:  # so that no one is idle, and no more is held in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps for want of memory; give fewer --workers") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_task: Callable[[Any], Any]
_stop: Event | None = None


def is_stopping() -> bool:
    """Tells a task whether it is done for nothing, since the main process gives up."""
    return _stop is not None and _stop.is_set()


def _start(make_task: Callable[[], Callable[[Any], Any]], stop: Event) -> None:
    global _task, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    _die_with_parent()
    _task, _stop = make_task(), stop


def _run(item: Any) -> Any:
    return _task(item)


def _die_with_parent() -> None:
    """Ends this worker process as soon as its parent is gone, even if that was killed and could tell no one."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def all_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
