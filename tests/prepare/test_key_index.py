from __future__ import annotations

import sqlite3

import pytest

from jettclip.data.counts import DataError
from jettclip.prepare.key_index import KeyIndex


def test_samples_that_come_again_are_told_from_other_images_of_their_key() -> None:
    with KeyIndex() as index:
        assert index.add([("a", b"1"), ("b", b"2")]) == ([], [])
        assert index.add([("a", b"1"), ("b", b"3"), ("c", b"1")]) == (["a"], ["b"])
        index.leave_out("x", ["a", "b", "a"])
        index.leave_out("y", ["c"])
        assert (index.left_out("x"), index.left_out("z")) == ({"a", "b"}, set())


def test_a_full_disk_is_an_error_with_a_remedy() -> None:
    with KeyIndex() as index:
        index._base.execute("PRAGMA max_page_count = 8")
        with pytest.raises(DataError, match="database or disk is full; free some space, or set TMPDIR"):
            index.add((f"{n:099d}", b"12345678") for n in range(10_000))
        index._base.close()
        with pytest.raises(DataError):
            index.left_out("x")
        index._base = sqlite3.connect("")
