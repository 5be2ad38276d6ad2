"""Chooses the rows of the held-out split."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import xxhash

from jettclip.data.rows import Lost, Row
from jettclip.prepare.references import Reference

Item = Row | Reference | Lost
"""What a source yields."""


def split_rows(
    rows: Callable[[], Iterator[Item]], root: str, count: int, way: str
) -> tuple[Iterator[Item], Iterator[Item]]:
    """Splits a source, which is read anew for every pass, into the held-out rows and the others.

    Args:
        rows: starts a pass.
        root: folder of the pictures: below it, a path does not tell where it lies.
        count: rows to hold out if the way is ``first``, pictures if it is ``hash``.
        way: ``first`` holds out the first rows, as Long-CLIP does (arXiv 2403.15378); ``hash`` the pictures whose
            paths have the smallest digests, each with all of its rows.
    """
    if way == "first":
        return islice(rows(), count), islice(rows(), count, None)
    chosen = smallest((identity(row, root) for row in rows() if not isinstance(row, Lost)), count)

    def is_held(row: Item) -> bool:
        return not isinstance(row, Lost) and identity(row, root) in chosen

    return (row for row in rows() if is_held(row)), (row for row in rows() if not is_held(row))


def identity(row: Row | Reference, root: str) -> str:
    """Returns what rows of the same picture share: its path below the root, or the key in a shard."""
    return os.path.relpath(row.image, root or ".") if isinstance(row, Row) else row.key


def smallest(names: Iterable[str], count: int) -> frozenset[str]:
    """Returns the names with the smallest digests, in memory that grows with `count` only."""
    heap: list[tuple[int, str]] = []  # of negative digests, so that the largest comes first
    held: set[str] = set()
    for name in names:
        if name in held:
            continue
        entry = (-xxhash.xxh3_64_intdigest(name.encode()), name)
        if len(heap) < count:
            heapq.heappush(heap, entry)
        elif heap and entry > heap[0]:
            held.remove(heapq.heapreplace(heap, entry)[1])
        else:
            continue
        held.add(name)
    return frozenset(held)
