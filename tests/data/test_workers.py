from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator

import pytest
from torch.utils.data import IterableDataset

from jettclip.data.counts import DataError
from jettclip.data.workers import run_workers


class Numbers(IterableDataset[int]):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def __iter__(self) -> Iterator[int]:
        yield 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_worker_yields_what_the_data_set_does(workers: int) -> None:
    assert list(run_workers(Numbers(), workers)) == [1] * max(1, workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_data_keeps_its_message(workers: int) -> None:
    with pytest.raises(DataError) as error:
        list(run_workers(Numbers(DataError("shard 'a.tar' cannot be opened: it is gone")), workers))
    assert str(error.value) == "shard 'a.tar' cannot be opened: it is gone"


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_keep_their_traceback(workers: int) -> None:
    with pytest.raises(KeyError) as error:
        list(run_workers(Numbers(KeyError("a bug")), workers))
    assert ("in __iter__" in str(error.value)) == (workers > 0)


class Allocations(IterableDataset[int]):
    """Frees 64 MiB of small pieces, and says how much of it stays with the process."""

    def __iter__(self) -> Iterator[int]:
        before = resident()
        pieces = [b"x" * 2**16 for _ in range(1024)]
        del pieces
        yield resident() - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these thresholds")
def test_loader_processes_keep_freed_memory_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (kept,) = run_workers(Allocations(), 1)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    (returned,) = run_workers(Allocations(), 1)
    assert kept > 50 * 2**20
    assert returned < 20 * 2**20


class Frozen(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield gc.get_freeze_count()


def test_loader_processes_need_not_collect_what_came_from_the_trainer() -> None:
    (frozen,) = run_workers(Frozen(), 1)
    assert frozen > len(gc.get_objects()) / 2
    assert list(run_workers(Frozen(), 0)) == [gc.get_freeze_count()] == [0]
