"""Remembers the samples of a whole data set on disk, so that memory does not grow with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple

from jettclip.prepare.key_table import open_base, reported


class Repeated(NamedTuple):
    """Which samples of a shard have come before, in other shards."""

    copies: list[str]  # keys of the same image
    clashes: list[str]  # keys that another image has


class KeyIndex:
    """The keys of all samples, with a digest of each image; and those that are to be left out, by shard.

    It lives in a file that SQLite deletes when it is closed.

    Raises:
        DataError: if the temporary disk is full; from the methods too.
    """

    def __init__(self) -> None:
        self._base = open_base(
            "seen (key TEXT PRIMARY KEY, digest BLOB)", "left_out (shard TEXT, key TEXT, PRIMARY KEY (shard, key))"
        )

    def add(self, samples: Iterable[tuple[str, bytes]]) -> Repeated:
        """Takes in the samples of a shard, as key and digest of the image; says which of them have come before."""
        copies: list[str] = []
        clashes: list[str] = []
        new = []
        for key, digest in samples:
            with reported():
                known = self._base.execute("SELECT digest FROM seen WHERE key = ?", (key,)).fetchone()
            if known is None:
                new.append((key, digest))
            else:
                (copies if known[0] == digest else clashes).append(key)
        self._write("INSERT OR IGNORE INTO seen VALUES (?, ?)", new)
        return Repeated(copies, clashes)

    def leave_out(self, shard: str, keys: Iterable[str]) -> None:
        """Remembers samples of a shard that are not to be kept."""
        self._write("INSERT OR IGNORE INTO left_out VALUES (?, ?)", [(shard, key) for key in keys])

    def left_out(self, shard: str) -> set[str]:
        """Returns the samples of a shard that are not to be kept."""
        with reported():
            return {key for (key,) in self._base.execute("SELECT key FROM left_out WHERE shard = ?", (shard,))}

    def _write(self, statement: str, rows: Sequence[tuple[str, object]]) -> None:
        with reported():
            self._base.execute("BEGIN")
            self._base.executemany(statement, rows)
            self._base.execute("COMMIT")

    def __enter__(self) -> KeyIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()
