from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from jettclip.data.counts import DataError
from jettclip.prepare.pool import run


def make_square(calls: list[int]) -> Callable[[int], int]:
    return lambda number: number**2 if number >= 0 else os._exit(1)


@pytest.mark.parametrize("workers", [1, 3])
def test_answers_come_in_order(workers: int) -> None:
    assert list(run(partial(make_square, []), range(50), 50, workers, "test")) == [n**2 for n in range(50)]


def test_items_are_taken_only_a_few_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    answers = run(partial(make_square, []), items(), 100, 2, "test")
    assert next(answers) == 0
    assert len(taken) < 10
    answers.close()  # type: ignore[attr-defined]


def test_a_worker_that_is_killed_is_an_error_in_one_line() -> None:
    with pytest.raises(DataError, match="^a worker process was killed, .*; give fewer --workers$"):
        list(run(partial(make_square, []), [1, -1, 2], 3, 2, "test"))


ENDLESS = """
import threading
from jettclip.prepare.pool import run

def make_task():
    def task(item):
        print("working", flush=True)
        threading.Event().wait()
    return task

list(run(make_task, range(2), 2, 2, "test"))
"""


def test_workers_do_not_outlive_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == ["working\n"] * 2
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ""  # it ends when no worker can write there any more
