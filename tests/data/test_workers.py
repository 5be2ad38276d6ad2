from __future__ import annotations

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
