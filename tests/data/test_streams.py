from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from jettclip.data.counts import DataError, Tally
from jettclip.data.manifest import DIFFERS, MISSING, member_digest, write_manifest
from jettclip.data.streams import find_manifest, open_shard, read_shard
from support import sample, write_shard, write_shards

WANTED = frozenset({"png", "short_caption", "long_caption"})


def shard_of(folder: Path, size: int, has_manifest: bool = False) -> str:
    """Writes a shard of ordinary samples, with or without its manifest."""
    url = write_shard(folder / "0.tar", [sample(i) for i in range(size)])
    if has_manifest:
        groups = read_shard(url, WANTED, Tally())
        write_manifest(url, [(g["__key__"], {name: member_digest(g[name]) for name in WANTED}) for g in groups])
    return url


def keys_of(url: str, **bounds: int) -> tuple[list[str], dict[str, int], dict[str, int]]:
    """Returns the keys that are read, and what is counted as dropped and as damage."""
    tally = Tally()
    keys = [group["__key__"] for group in read_shard(url, WANTED, tally, **bounds)]
    return keys, tally.dropped, tally.damaged


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


def test_a_shard_with_a_manifest_is_held_against_it(tmp_path: Path) -> None:
    url = shard_of(tmp_path, 4, has_manifest=True)
    assert keys_of(url) == (["000000", "000001", "000002", "000003"], {}, {})
    write_shard(tmp_path / "0.tar", [sample(0), sample(9) | {"__key__": "000001"}, sample(3), sample(7)])
    damage = {"key is not in the manifest": 1}
    assert keys_of(url) == (["000000", "000003"], {DIFFERS: 1, MISSING: 1}, damage)
    assert keys_of(url, first=2, stop=4, size=4) == (["000003"], {MISSING: 1}, damage)
    assert keys_of(url, first=0, stop=1, size=4) == (["000000"], {}, {})


def test_without_a_manifest_what_is_missing_is_counted_by_the_size(tmp_path: Path) -> None:
    url = shard_of(tmp_path, 3)
    fewer, more = (
        "shard holds fewer samples than it did when counted",
        "shard holds more samples than it did when counted",
    )
    assert keys_of(url, stop=3, size=3) == (["000000", "000001", "000002"], {}, {})
    assert keys_of(url, first=1, stop=9, size=9) == (["000001", "000002"], {fewer: 6}, {})
    assert keys_of(url, first=1, stop=2, size=2) == (["000001"], {}, {more: 1})
    assert keys_of(url, first=1, stop=2, size=3) == (["000001"], {}, {})
    assert keys_of(url) == (["000000", "000001", "000002"], {}, {})


def test_everything_is_counted_when_the_last_sample_is_handed_on(tmp_path: Path) -> None:
    url = shard_of(tmp_path, 2, has_manifest=True)
    write_shard(tmp_path / "0.tar", [sample(0), sample(1) | {"short_caption": "another"}, sample(2)])
    tally = Tally()
    assert next(read_shard(url, WANTED, tally))["__key__"] == "000000"
    assert (tally.dropped, tally.damaged) == ({DIFFERS: 1}, {"key is not in the manifest": 1})


def test_a_manifest_that_cannot_be_read_is_counted_and_the_shard_read_without(tmp_path: Path) -> None:
    url = shard_of(tmp_path, 2)
    (tmp_path / "0.manifest.json").write_bytes(b"\0" * 100)
    assert keys_of(url) == (["000000", "000001"], {}, {"manifest cannot be read": 1})
    assert keys_of(url, first=1, stop=2, size=2) == (["000001"], {}, {})  # who reads the first sample has counted it


def test_a_size_that_contradicts_the_manifest_is_counted(tmp_path: Path) -> None:
    url = shard_of(tmp_path, 2, has_manifest=True)
    damage = {"manifest and sizes.json differ in the number of samples": 1}
    assert keys_of(url, stop=3, size=3) == (["000000", "000001"], {}, damage)
    assert keys_of(url, stop=1, size=1) == (["000000"], {}, damage)


def test_remote_shards_have_manifests_too(tmp_path: Path) -> None:
    files: Any = fsspec.filesystem("memory")
    url = shard_of(tmp_path, 2, has_manifest=True)
    files.pipe("/held/0.tar", Path(write_shard(tmp_path / "1.tar", [sample(1)])).read_bytes())
    assert keys_of("memory://held/0.tar") == (["000001"], {}, {})
    files.pipe("/held/0.manifest.json", Path(url).with_suffix(".manifest.json").read_bytes())
    assert keys_of("memory://held/0.tar") == (["000001"], {MISSING: 1}, {})
    files.rm("/held", recursive=True)


def test_commands_have_no_manifest(tmp_path: Path) -> None:
    url = shard_of(tmp_path, 2, has_manifest=True)
    assert find_manifest(f"pipe:cat {url}") is None
    assert find_manifest(url) is not None
