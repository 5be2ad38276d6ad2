"""Keys in a file: what grows with the data does not grow in memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from jettclip.data.counts import DataError


class KeyTable:
    """A set of keys, each with a number, in a file that SQLite deletes when it is closed."""

    def __init__(self) -> None:
        self._base = open_base("keys (key TEXT PRIMARY KEY, number INTEGER)")
        with reported():
            self._base.execute("BEGIN")

    def add(self, key: str, number: int = 0) -> bool:
        """Adds a key; tells whether it is new, and changes nothing if it is not."""
        with reported():
            return self._base.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (key, number)).rowcount == 1

    def find(self, key: str) -> int | None:
        """Returns the number of a key; None if it is not in the set."""
        with reported():
            row = self._base.execute("SELECT number FROM keys WHERE key = ?", (key,)).fetchone()
        return None if row is None else int(row[0])

    def clear(self) -> None:
        """Removes all keys."""
        with reported():
            self._base.execute("DELETE FROM keys")

    def close(self) -> None:
        """Deletes the file."""
        self._base.close()


def read_keys(path: str, flag: str) -> KeyTable:
    """Reads a file of one key a line.

    Raises:
        DataError: if it cannot be read; `flag` says where its name came from.
    """
    table = KeyTable()
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for line in lines:
                if line.strip():
                    table.add(line.strip())
    except (OSError, UnicodeDecodeError) as error:
        table.close()
        raise DataError(f"{flag} {path!r} cannot be read: {error}; give a file of one key a line") from error
    return table


def open_base(*tables: str) -> sqlite3.Connection:
    """Opens a database of some tables, in a file that SQLite deletes when it is closed."""
    base = sqlite3.connect("", isolation_level=None)
    with reported():
        base.execute("PRAGMA journal_mode = OFF")
        for table in tables:
            base.execute(f"CREATE TABLE {table} WITHOUT ROWID")
    return base


@contextmanager
def reported() -> Iterator[None]:
    """Turns a failure of SQLite, as on a full disk, into an error with a remedy."""
    try:
        yield
    except sqlite3.Error as error:
        raise DataError(f"keys cannot be kept in a temporary file: {error}; free some space, or set TMPDIR") from error
