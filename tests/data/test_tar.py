from __future__ import annotations

import gzip
import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from jettclip.data.counts import Tally
from jettclip.data.tar import BLOCK, read_samples, split_name, walk
from support import sample, write_shard

ALL = frozenset({"png", "txt", "json", "long_caption", "short_caption", "long.txt"})


def tar_bytes(members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytearray:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return bytearray(stream.getvalue())


def read(data: bytes, tally: Tally | None = None, **bounds: int | None) -> list[dict[str, object]]:
    return list(read_samples(io.BytesIO(data), ALL, tally or Tally(), "shard", **bounds))  # type: ignore[arg-type]


def member_at(data: bytes, name: str) -> int:
    return data.index(name.encode() + b"\0") // BLOCK * BLOCK


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    samples = [
        sample(0),
        sample(1, **{"PNG": b"picture", "long.txt": "a dog", "json": {"a": 1}}),
        {"__key__": "./folder.v1/inner/0002", "txt": "x" * 1500, "png": b""},
        {"__key__": "0002", "txt": "the same name in another folder"},
    ]
    path = write_shard(tmp_path / "000000.tar", samples)
    with open(path, "rb") as stream:  # the stages of webdataset.WebDataset after the opening, which leaks the file
        peer = list(group_by_keys(tar_file_expander([{"url": path, "stream": stream}])))
        expected = [{name: value for name, value in s.items() if name != "__url__"} for s in peer]
        assert list(read_samples(stream, ALL, Tally(), path)) == expected
    assert len(expected) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a/b.c/0001.Long.TXT", ("a/b.c/0001", "long.txt")),
        ("./0001.jpg", ("./0001", "jpg")),
        ("../../etc/passwd.jpg", ("../../etc/passwd", "jpg")),  # a key, never a path
        ("README", None),
        (".hidden.jpg", None),
        ("folder/._0001.jpg", None),
        ("0001.", None),
    ],
)
def test_name_is_split_at_the_first_dot_of_the_file_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("format", "length"),
    [
        (tarfile.USTAR_FORMAT, 90),
        (tarfile.USTAR_FORMAT, 150),  # split over two fields; longer ones do not fit
        (tarfile.GNU_FORMAT, 150),
        (tarfile.GNU_FORMAT, 700),
        (tarfile.PAX_FORMAT, 150),
        (tarfile.PAX_FORMAT, 700),
    ],
)
def test_long_names_are_read_in_every_format(format: int, length: int) -> None:
    key = "folder/" * ((length - 20) // 7) + "ü" * 10
    assert read(tar_bytes([(f"{key}.txt", b"one"), ("b.txt", b"two")], format)) == [
        {"__key__": key, "txt": b"one"},
        {"__key__": "b", "txt": b"two"},
    ]


def test_only_wanted_members_are_read() -> None:
    data = tar_bytes([("a.pickle", b"evil" * 1000), ("a.txt", b"one"), ("a.pth.gz", b"evil")])
    asked: list[int] = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    found = list(read_samples(Watched(bytes(data)), frozenset({"txt"}), Tally(), "shard"))
    assert found == [{"__key__": "a", "txt": b"one"}]
    assert sorted(size for size in asked if size != BLOCK) == [3]


def test_bounds_select_samples_and_not_members() -> None:
    data = tar_bytes([(f"{key}.{extension}", key.encode()) for key in "abcde" for extension in ("png", "txt")])
    assert [s["__key__"] for s in read(data, first=1, stop=3)] == ["b", "c"]
    assert [s["__key__"] for s in read(data, first=4)] == ["e"]


def test_what_follows_a_damaged_header_is_read_and_the_damage_counted() -> None:
    data = tar_bytes([(f"{key}.{extension}", bytes([65]) * 1300) for key in "abc" for extension in ("png", "txt")])
    data[member_at(data, "b.png") + 120] ^= 0xFF
    tally = Tally()
    found = read(data, tally)
    assert [(s["__key__"], sorted(s)[1:]) for s in found] == [
        ("a", ["png", "txt"]),
        ("b", ["txt"]),
        ("c", ["png", "txt"]),
    ]
    assert tally.damaged == {"tar header is damaged": 1}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert len(tar.getnames()) == 2  # where tarfile, and so webdataset, stops


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_long_name_is_not_given_to_another_member(format: int) -> None:
    long = "n" * 150 + ".txt"
    data = tar_bytes([(long, b"lost"), ("b.txt", b"kept")], format)
    position = data.index(b"lost") - BLOCK  # the header that the long name belongs to
    data[position] ^= 0xFF
    assert read(data) == [{"__key__": "b", "txt": b"kept"}]


@pytest.mark.parametrize("size", [b"-0000001000\0", b"\xff" + b"\xff" * 10 + b"\x00"])
def test_a_negative_size_does_not_lead_back(size: bytes) -> None:
    data = tar_bytes([("a.txt", b"one"), ("b.txt", b"two")])
    header = data[:BLOCK]
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tally = Tally()
    assert [s["__key__"] for s in read(header + data[BLOCK:], tally)] == ["b"]
    assert tally.damaged == {"tar header is damaged": 1}


@pytest.mark.parametrize("cut", [1, 700, 1200, 2000, 2600, 3072])
def test_a_shard_cut_short_gives_what_is_whole_and_is_counted(cut: int) -> None:
    data = tar_bytes([(f"{key}.txt", key.encode() * 600) for key in "ab"])  # 512 + 1024 bytes each
    tally = Tally()
    found = read(data[:cut], tally)
    assert tally.damaged == {"shard is cut short": 1}
    assert [s["__key__"] for s in found if "txt" in s] == ["a", "b"][: (cut + 424) // 1536]


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compression_is_counted(damage: str, tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(bytes(tar_bytes([(f"{i}.txt", b"%d" % i * 5000) for i in range(50)]))))
    packed = packed[: len(packed) // 2] if damage == "cut" else packed[:-600] + bytes(600)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(packed)
    tally = Tally()
    with gzip.open(path) as stream:
        found = list(read_samples(stream, ALL, tally, "shard"))  # type: ignore[arg-type]
    assert 0 < len(found) < 50
    assert tally.damaged["shard is cut short"] == 1


def test_members_after_the_end_are_read_and_counted() -> None:
    tally = Tally()
    found = read(tar_bytes([("a.txt", b"one")]) + tar_bytes([("b.txt", b"two")]), tally)
    assert [s["__key__"] for s in found] == ["a", "b"]
    assert tally.damaged == {"members follow the end of the archive": 1}


def test_a_key_that_comes_again_is_left_out_and_counted() -> None:
    tally = Tally()
    found = read(tar_bytes([("a.txt", b"one"), ("b.txt", b"two"), ("a.txt", b"three"), ("c.txt", b"four")]), tally)
    assert [s["txt"] for s in found] == [b"one", b"two", b"four"]
    assert tally.damaged == {"key occurs again later in the shard": 1}


def test_a_member_that_comes_twice_is_read_once_and_counted() -> None:
    tally = Tally()
    assert read(tar_bytes([("a.txt", b"one"), ("a.txt", b"two")]), tally) == [{"__key__": "a", "txt": b"one"}]
    assert tally.damaged == {"member occurs twice in a sample": 1}


@pytest.mark.parametrize("bounds", [[0], [0, 2], [0, 1, 2, 3], [0, 4], [0, 5]])
def test_slices_together_count_and_log_all_damage_once(bounds: list[int], caplog: pytest.LogCaptureFixture) -> None:
    names = ["first", "a.png", "a.png", "a.txt", "b.png", "x", "b.txt", "a.txt", "c.txt", "c.txt", "d.txt", "last"]
    data = tar_bytes([(name, name.encode()) for name in names])
    data[member_at(data, "b.png") + 120] ^= 0xFF
    damaged, found = Counter[str](), ""
    for first, stop in pairwise([*bounds, None]):
        tally = Tally()
        found += "".join(str(s["__key__"]) for s in read(data, tally, first=first, stop=stop))
        damaged += tally.damaged
    assert found == "abcd"
    assert damaged == {
        "tar header is damaged": 1,
        "member name has no key and extension": 3,
        "member occurs twice in a sample": 2,
        "key occurs again later in the shard": 1,
    }
    assert caplog.text.count("tar header is damaged") == caplog.text.count("key occurs again") == 1


def test_links_and_folders_are_no_members_whatever_size_they_state() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, "/etc/passwd", 5000
            tar.addfile(entry)
        entry = tarfile.TarInfo("folder/c.txt")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"c"))
    tally = Tally()
    assert read(stream.getvalue(), tally) == [{"__key__": "folder/c", "txt": b"c"}]
    assert tally.damaged == {"member is not a regular file": 2}


def test_a_member_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jettclip.data.tar.MAX_MEMBER_BYTES", 10)
    tally = Tally()
    assert read(tar_bytes([("a.png", b"x" * 11), ("a.txt", b"x" * 10)]), tally) == [{"__key__": "a", "txt": b"x" * 10}]
    assert tally.damaged.total() == 1


def test_a_name_that_is_not_utf8_can_still_be_logged_and_hashed() -> None:
    data = tar_bytes([("name.txt", b"one")])
    data[:4] = b"na\xff\xfe"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    (found,) = read(data)
    assert str(found["__key__"]).encode("utf-8") == rb"na\xff\xfe"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7167), st.binary(min_size=1, max_size=12)), min_size=1, max_size=6))
def test_no_damage_stops_the_reading_for_good(changes: list[tuple[int, bytes]]) -> None:
    data = tar_bytes([(f"{'n' * 40 * i}{i}.txt", b"%d" % i * 300) for i in range(4)])
    for position, change in changes:
        data[position : position + len(change)] = change
    found = read(data + tar_bytes([("last.txt", b"whole")]))
    assert found[-1] == {"__key__": "last", "txt": b"whole"}


def test_walk_lists_members_that_can_be_read_in_any_order() -> None:
    members = list(walk(io.BytesIO(tar_bytes([("a.txt", b"one"), ("b.txt", b"two")])), Tally(), "shard"))
    assert [member.read() for member in reversed(members)] == [b"two", b"one"]


FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "type": (156, 157), "magic": (257, 265),
          "device": (329, 337), "prefix": (345, 500)}  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(list(FIELDS)),
    st.binary(max_size=12) | st.from_regex(rb"[0-7 \0]{1,12}", fullmatch=True),
    st.sampled_from([0, 0, 0, 1]),
)
def test_a_header_is_read_as_tarfile_reads_it(format: int, field: str, value: bytes, error: int) -> None:
    data = tar_bytes([("a.txt", b"one")], format)
    header = data[:BLOCK]
    start, end = FIELDS[field]
    value = value[: end - start]
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) + error)
    try:
        expected = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        expected = None
    tally = Tally()
    found = [(member.name, member.size) for member in walk(io.BytesIO(header + bytes(2 * BLOCK)), tally, "shard")]
    if expected is None or expected.size < 0:
        assert found == []
        assert tally.damaged["tar header is damaged"] == 1
    elif expected.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        assert found == [(expected.name, expected.size)]
    else:
        assert found == []
