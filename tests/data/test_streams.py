from __future__ import annotations

from pathlib import Path

import pytest

from jettclip.data.counts import DataError, Tally
from jettclip.data.streams import open_shard, read_shard
from support import write_shards


def test_samples_know_their_shard(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    groups = list(read_shard(url, frozenset({"short_caption"}), Tally(), first=1, stop=2))
    assert groups == [{"__key__": "000001", "__shard__": url, "short_caption": b"thing 1"}]


def test_a_command_that_fails_is_an_error_naming_it() -> None:
    with pytest.raises(DataError, match=r"pipe:exit 3.*cannot be opened"):
        open_shard("pipe:exit 3")


def test_a_shard_that_has_vanished_is_an_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tar"):
        open_shard(str(tmp_path / "gone.tar"))
