from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jettclip.data import sizes as module
from jettclip.data.counts import DataError
from jettclip.data.manifest import write_manifest
from jettclip.data.shards import find_shards
from support import run_ranks, sample, write_shard, write_shards


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are counted from now on."""
    names: list[str] = []
    count = module._count_one

    def note(url: str) -> int:
        names.append(os.path.basename(url))
        return count(url)

    monkeypatch.setattr(module, "_count_one", note)
    return names


def sizes_of(urls: str | list[str]) -> list[int]:
    return [shard.size for shard in find_shards(urls)]


def recorded(folder: Path) -> Any:
    return json.loads((folder / "sizes.json").read_text())


def write_later(path: Path, samples: int, seconds: float = 10) -> None:
    """Writes a shard anew, with a date after that of its ``sizes.json``."""
    write_shard(path, [sample(i) for i in range(samples)])
    time = (path.parent / "sizes.json").stat().st_mtime + seconds
    os.utime(path, (time, time))


def test_samples_are_counted(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3, 0, 2])
    assert [shard.size for shard in find_shards(urls)] == [3, 0, 2]
    assert [shard.size for shard in find_shards(f"{tmp_path}/{{000000..000002}}.tar")] == [3, 0, 2]


def test_many_shards_are_counted_by_several_processes(tmp_path: Path) -> None:
    sizes = [1 + i % 3 for i in range(16)]
    assert [shard.size for shard in find_shards(write_shards(tmp_path, sizes))] == sizes


def test_recorded_sizes_are_believed_and_what_they_leave_out_is_counted(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3, 4])
    (tmp_path / "sizes.json").write_text(json.dumps({"000000.tar": 300}))
    assert [shard.size for shard in find_shards(urls)] == [300, 4]
    assert [shard.size for shard in find_shards([f"file:{url}" for url in urls.split("::")])] == [300, 4]


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"000000.tar": "many"}', '{"000000.tar": null}'])
def test_unreadable_sizes_are_an_error_naming_the_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(DataError, match=r"sizes\.json"):
        find_shards(write_shards(tmp_path, [3]))


def test_remote_shards_are_counted_with_a_warning_unless_their_sizes_are_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: Any = fsspec.filesystem("memory")
    files.pipe("/shards/000000.tar", Path(write_shard(tmp_path / "000000.tar", [sample(0), sample(1)])).read_bytes())
    with caplog.at_level(logging.WARNING):
        assert [shard.size for shard in find_shards("memory://shards/000000.tar")] == [2]
    assert "Counting the samples of 1 remote shards" in caplog.text
    caplog.clear()
    files.pipe("/shards/sizes.json", b'{"000000.tar": 200}')
    assert [shard.size for shard in find_shards("memory://shards/000000.tar")] == [200]
    assert not caplog.text
    files.rm("/shards", recursive=True)


def test_what_was_counted_is_read_at_the_next_start(
    tmp_path: Path, counted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    urls = write_shards(tmp_path / "a", [3, 4]) + "::file:" + write_shards(tmp_path / "b", [5])
    with caplog.at_level(logging.INFO):
        assert sizes_of(urls) == [3, 4, 5]
    assert recorded(tmp_path / "a") == {"000000.tar": 3, "000001.tar": 4}
    assert recorded(tmp_path / "b") == {"000000.tar": 5}
    assert "Counted 2 shards, and wrote their sizes to" in caplog.text
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["000000.tar", "000001.tar", "sizes.json"]
    assert len(counted) == 3
    written = (tmp_path / "a/sizes.json").stat().st_mtime_ns
    assert sizes_of(urls) == [3, 4, 5]
    assert len(counted) == 3
    assert (tmp_path / "a/sizes.json").stat().st_mtime_ns == written


def test_a_shard_that_is_newer_than_its_recorded_size_is_counted_again(tmp_path: Path, counted: list[str]) -> None:
    urls = write_shards(tmp_path, [3, 4])
    (tmp_path / "sizes.json").write_text(json.dumps({"000000.tar": 300, "000001.tar": 400}))
    write_later(tmp_path / "000001.tar", 6)
    assert sizes_of(urls) == [300, 6]
    assert counted == ["000001.tar"]
    assert recorded(tmp_path) == {"000000.tar": 300, "000001.tar": 6}


def test_writing_does_not_confirm_a_recorded_size_that_no_longer_holds(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, [3, 4]).split("::")
    (tmp_path / "sizes.json").write_text(json.dumps({"000000.tar": 300}))
    write_later(Path(first), 5, seconds=-10)  # once the file is written anew, the shard no longer looks newer
    os.utime(tmp_path / "sizes.json", (0, 0))
    assert sizes_of(second) == [4]
    assert recorded(tmp_path) == {"000001.tar": 4}
    assert sizes_of(first) == [5]


def test_an_empty_shard_is_counted_every_time(tmp_path: Path, counted: list[str]) -> None:
    urls = write_shards(tmp_path, [3, 0])
    assert sizes_of(urls) == [3, 0]
    assert recorded(tmp_path) == {"000000.tar": 3}
    write_shard(tmp_path / "000001.tar", [sample(0)])
    os.utime(tmp_path / "000001.tar", (0, 0))
    assert sizes_of(urls) == [3, 1]
    assert counted == ["000000.tar", "000001.tar", "000001.tar"]


def test_a_folder_that_cannot_be_written_to_costs_the_counting_only(
    tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    urls = write_shards(tmp_path, [3])
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr("os.replace", refuse)
        assert sizes_of(urls) == [3]
    assert "cannot be written: read-only" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["000000.tar"]
    assert sizes_of(urls) == [3]
    assert len(counted) == 2


def test_commands_and_resampling_leave_no_sizes_behind(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    find_shards(url, resampled=True)
    commands = [f"pipe:cat {url}", f"pipe:cat {url} s3://bucket/000000.tar 2> /dev/null; true"]
    assert [shard.size for shard in find_shards(commands, allow_pipe=True)] == [3, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["000000.tar"]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3, 4])
    assert run_ranks(2, lambda: sizes_of(urls)) == [[3, 4], [3, 4]]
    assert recorded(tmp_path) == {"000000.tar": 3, "000001.tar": 4}


def test_a_manifest_says_what_a_damaged_shard_should_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, other = write_shards(tmp_path, [3, 4]).split("::")
    write_manifest(url, [(f"{i}", {}) for i in range(5)])
    assert sizes_of([url, other]) == [5, 4]
    assert recorded(tmp_path) == {"000000.tar": 5, "000001.tar": 4}
    write_later(tmp_path / "000000.tar", 1)
    write_later(tmp_path / "000001.tar", 1)
    assert sizes_of([url, other]) == [5, 1]
    Path(url).write_bytes(b"")
    assert sizes_of([url, other]) == [5, 1]
    (tmp_path / "000000.manifest.json").write_text("{")
    assert sizes_of([url, other]) == [0, 1]
    assert "the shard is counted instead: " in caplog.text
    assert f"1 of 2 shards hold no samples, or are no tar files; the first is {url}" in caplog.text


def test_a_manifest_that_is_newer_than_the_recorded_size_is_believed(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    assert sizes_of(url) == [3]
    write_manifest(url, [("a", {}), ("b", {})])
    os.utime(tmp_path / "000000.manifest.json", (2**33, 2**33))
    assert sizes_of(url) == [2]
