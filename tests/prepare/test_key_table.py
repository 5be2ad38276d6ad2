from __future__ import annotations

from pathlib import Path

import pytest

from jettclip.data.counts import DataError
from jettclip.prepare.key_table import KeyTable, read_keys


def test_keys_are_added_once_and_found_with_their_number() -> None:
    table = KeyTable()
    assert table.add("a", 3)
    assert table.add("b")
    assert not table.add("a", 4)
    assert (table.find("a"), table.find("b"), table.find("c")) == (3, 0, None)
    table.clear()
    assert table.find("a") is None
    table.close()


def test_a_file_has_one_key_a_line(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_bytes("\ufeffa\r\n\n é \na\n".encode())
    table = read_keys(str(tmp_path / "keys.txt"), "--keep-keys")
    assert [table.find(key) for key in ("a", "é", "")] == [0, 0, None]
    table.close()


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content:
        (tmp_path / "keys.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"--drop-keys '.*keys.txt' cannot be read: .*; give a file of one key a line"):
        read_keys(str(tmp_path / "keys.txt"), "--drop-keys")
