"""Keeps what belongs to the shards of a data set open, for those that were asked for last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from jettclip.data.counts import Dropped

T = TypeVar("T")


class Opened(Generic[T]):
    """What is open of each shard, or why it cannot be opened.

    Args:
        open_one: opens what belongs to a shard, or raises Dropped.
        most: shards that stay open, since a shuffle buffer mixes the samples of several.
    """

    def __init__(self, open_one: Callable[[str], T], most: int) -> None:
        self._open_one, self._most = open_one, most
        self._opened: dict[str, T | Dropped] = {}

    def of(self, shard: str) -> T:
        """Returns what is open of a shard, opening it if it is not.

        Raises:
            Dropped: if it could not be opened, with the same reason every time.
        """
        if shard not in self._opened:
            if len(self._opened) == self._most:
                del self._opened[next(iter(self._opened))]  # the one opened first
            try:
                self._opened[shard] = self._open_one(shard)
            except Dropped as problem:
                problem.__cause__ = problem.__context__ = None  # or its frames would keep the file open
                self._opened[shard] = problem
        opened = self._opened[shard]
        if isinstance(opened, Dropped):
            raise opened.with_traceback(None)  # or it would collect the frames of every sample of the shard
        return opened
