from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from jettclip.data.counts import DataError, Tally
from jettclip.data.shards import Shard
from jettclip.data.sources import ShardSource
from support import sample, write_shard, write_shards

WANTED = frozenset({"png", "long_caption"})


def keys_of(source: ShardSource, tally: Tally, first: int = 0, stop: int | None = None) -> list[str]:
    return [group["__key__"] for group in source.read(source.shards[0], WANTED, tally, first, stop)]


def test_samples_come_from_slices_of_shards(tmp_path: Path) -> None:
    source = ShardSource(write_shards(tmp_path, [4, 2]))
    assert not source.row_by_row
    assert source.lost == {}
    assert [shard.size for shard in source.shards] == [4, 2]
    tally = Tally()
    (group,) = source.read(source.shards[0], WANTED, tally, 1, 2)
    assert (group["__key__"], group["__shard__"], sorted(group)[2:]) == (
        "000001", str(tmp_path / "000000.tar"), ["long_caption", "png"],
    )  # fmt: skip
    assert keys_of(source, tally) == ["000000", "000001", "000002", "000003"]
    assert not tally.dropped
    assert not tally.damaged


def test_samples_that_a_shard_has_lost_are_counted_by_the_slices_they_were_of(tmp_path: Path) -> None:
    source = ShardSource(write_shards(tmp_path, [6]))
    write_shard(tmp_path / "000000.tar", [sample(0), sample(1)])
    lost = "shard holds fewer samples than it did when counted"
    for first, stop, keys, count in ((0, 1, ["000000"], 0), (1, 4, ["000001"], 2), (4, 6, [], 2)):
        tally = Tally()
        assert keys_of(source, tally, first, stop) == keys
        assert tally.dropped == ({lost: count} if count else {})


def test_a_drawn_shard_without_samples_is_counted_and_ends_the_run_if_there_are_only_such(tmp_path: Path) -> None:
    source = ShardSource(write_shards(tmp_path, [0]), resampled=True)
    assert source.shards == [Shard(str(tmp_path / "000000.tar"), 0)]
    tally = Tally()
    assert keys_of(source, tally) == []
    assert tally.dropped == {"shard holds no samples": 1}
    for _ in range(98):
        keys_of(source, tally)
    with pytest.raises(DataError, match="none of the first 100 samples is usable: shard holds no samples 100"):
        keys_of(source, tally)


def test_a_source_is_the_same_in_a_process_that_gets_it_by_pickle(tmp_path: Path) -> None:
    source = ShardSource(write_shards(tmp_path, [2]), "3")
    assert pickle.loads(pickle.dumps(source)).shards == source.shards == [Shard(str(tmp_path / "000000.tar"), 2, 3.0)]
