"""Accounts for every row: written, or dropped by reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jettclip.data.counts import DataError
from jettclip.files import whole_file

MOST_EXAMPLES = 5


class Account:
    """The rows of a split, or of a shard.

    Attributes:
        read: rows that were looked at.
        written: samples that were written.
        dropped: how many were not, by reason, and which of them came first.
    """

    def __init__(self) -> None:
        self.read = self.written = 0
        self.dropped: dict[str, dict[str, Any]] = {}

    def drop(self, reason: str, example: str) -> None:
        """Counts a row that makes no sample."""
        self._drop(reason, 1, [example])

    def add(self, other: Mapping[str, Any]) -> None:
        """Adds what another account says in `as_json`."""
        self.read += other["read"]
        self.written += other["written"]
        for reason, entry in other["dropped"].items():
            self._drop(reason, entry["count"], entry["examples"])

    def as_json(self) -> dict[str, Any]:
        """Returns the figures as JSON has them, the most frequent reason first."""
        dropped = dict(sorted(self.dropped.items(), key=lambda entry: (-entry[1]["count"], entry[0])))
        return {"read": self.read, "written": self.written, "dropped": dropped}

    def check(self) -> None:
        """Raises RuntimeError if a row is neither written nor dropped, which would be a mistake in this program."""
        dropped = sum(self.counts().values())
        if self.read != self.written + dropped:
            raise RuntimeError(f"{self.read} rows were read, but {self.written} written and {dropped} dropped")

    def counts(self) -> dict[str, int]:
        """Returns the rows dropped, by reason."""
        return {reason: entry["count"] for reason, entry in self.dropped.items()}

    def _drop(self, reason: str, count: int, examples: list[str]) -> None:
        entry = self.dropped.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] += examples[: MOST_EXAMPLES - len(entry["examples"])]


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file that appears only when it is whole.

    Raises:
        DataError: if it cannot be written; nothing is left behind.
    """
    with writing(path), whole_file(path) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=1, ensure_ascii=True))


def read_json(path: str) -> Any:
    """Returns what a JSON file holds; None if there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turns a failure to write into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; make room or choose another --output, and the same "
            "command goes on"
        ) from error
