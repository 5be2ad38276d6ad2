from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from jettclip.data.counts import DataError
from jettclip.data.shards import Shard, expand_urls, find_shards
from jettclip.data.streams import open_shard
from support import run_ranks, write_shards


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a/{000..002}.tar", ["a/000.tar", "a/001.tar", "a/002.tar"]),
        ("a/{0..1}.tar::b/{x,y}.tar", ["a/0.tar", "a/1.tar", "b/x.tar", "b/y.tar"]),
        (["a/{0..1}.tar", "b.tar"], ["a/0.tar", "a/1.tar", "b.tar"]),
        ("pipe:cat {0..1}.tar", ["pipe:cat 0.tar", "pipe:cat 1.tar"]),
    ],
)
def test_urls_expand_as_in_openclip(urls: str | list[str], expected: list[str]) -> None:
    assert [url for url, _ in expand_urls(urls)] == expected


def test_each_shard_has_the_weight_of_its_source() -> None:
    assert expand_urls("a/{0..1}.tar::b.tar", "2::0.5") == [("a/0.tar", 2.0), ("a/1.tar", 2.0), ("b.tar", 0.5)]


@pytest.mark.parametrize("weights", ["2", "2::1::1", "2::x", "2::0", "2::-1", "nan::1", "inf::1", "2:1"])
def test_weights_that_do_not_fit_the_sources_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match=r"--train-data-upsampling-factors .* give one positive number a source"):
        expand_urls("a/{0..9}.tar::b.tar", weights)


def test_resampled_shards_need_no_size(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3, 4])
    first, second = urls.split("::")
    assert find_shards(urls, "2::1", resampled=True) == [Shard(first, 0, 2.0), Shard(second, 0, 1.0)]


def test_missing_shards_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 1])
    with pytest.raises(DataError, match=r"3 shards do not exist, the first is .*000002\.tar"):
        find_shards(f"{tmp_path}/{{000000..000004}}.tar")


@pytest.mark.parametrize("sizes", [[0], [0, 0]])
def test_shards_without_samples_are_an_error(sizes: list[int], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no samples"):
        find_shards(write_shards(tmp_path, sizes))


def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("not a tar" * 1000)
    with pytest.raises(DataError, match="holds no samples"):
        find_shards(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("resampled", [False, True])
def test_commands_run_only_where_they_are_allowed(resampled: bool, tmp_path: Path) -> None:
    path, mark = write_shards(tmp_path, [3]), tmp_path / "mark"
    url = f"pipe:touch {mark}; cat {path}"
    with pytest.raises(DataError, match="--allow-pipe-urls"):
        find_shards(url, resampled=resampled)
    assert not mark.exists()
    (shard,) = find_shards(url, resampled=resampled, allow_pipe=True)
    assert shard.size == (0 if resampled else 3)
    with open_shard(shard.url) as stream:
        assert stream.read() == Path(path).read_bytes()
        assert stream.seek(0) == 0


def test_file_urls_and_compressed_shards_are_opened(tmp_path: Path) -> None:
    path = Path(write_shards(tmp_path, [3]))
    packed = tmp_path / "000001.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for url in (f"file:{path}", f"file://{path}", str(packed)):
        assert [shard.size for shard in find_shards(url)] == [3]
        with open_shard(url) as stream:
            assert stream.read() == path.read_bytes()


def test_every_rank_is_told_what_the_first_one_counted(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3, 4])
    assert run_ranks(2, lambda: [shard.size for shard in find_shards(urls)]) == [[3, 4], [3, 4]]


def test_every_rank_stops_if_the_first_one_finds_a_mistake(tmp_path: Path) -> None:
    def find() -> str:
        with pytest.raises(DataError) as error:
            find_shards(str(tmp_path / "none.tar"))
        return str(error.value)

    first, second = run_ranks(2, find, timeout=30)
    assert first == second
    assert "do not exist" in first
