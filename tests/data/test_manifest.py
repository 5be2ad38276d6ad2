from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jettclip.data.counts import DataError, Tally
from jettclip.data.manifest import (
    DIFFERS,
    INCOMPLETE,
    MISSING,
    ManifestReader,
    manifest_path,
    member_digest,
    parse_manifest,
    write_manifest,
)

WANTED = frozenset({"jpg", "txt"})
Members = Sequence[tuple[str, bytes]]
CLEAN = [(f"{key}.{extension}", f"{key} {extension}".encode() * 99) for key in "abcde" for extension in ("jpg", "txt")]


def manifest_of(members: Members) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, data in members:
        key, extension = name.split(".", 1)
        found.setdefault(key, {})[extension] = member_digest(data)
    return found


def tar_of(members: Members) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def read(
    members: Members | bytes, clean: Members = CLEAN, wanted: frozenset[str] = WANTED, **bounds: int
) -> tuple[list[dict[str, Any]], Tally]:
    tally = Tally()
    data = members if isinstance(members, bytes) else tar_of(members)
    reader = ManifestReader(manifest_of(clean), wanted, tally, "000000.tar", **bounds)
    return list(reader.read(io.BytesIO(data))), tally


def keys(groups: list[dict[str, Any]]) -> str:
    return "".join(group["__key__"] for group in groups)


def changed(name: str, data: bytes, members: Members = CLEAN) -> Members:
    return [(other, data if other == name else its) for other, its in members]


def renamed(name: str, new: str) -> Members:
    return [(new if other == name else other, data) for other, data in CLEAN]


def without(name: str, members: Members = CLEAN) -> Members:
    return [(other, data) for other, data in members if other != name]


def test_a_written_manifest_is_read_again_in_order(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    samples = [("b", {"jpg": "01", "txt": "02"}), ("a", {}), ("\udcff\n", {"long.txt": "03"})]
    write_manifest(shard, samples)
    assert [path.name for path in tmp_path.iterdir()] == ["0.manifest.json"]
    path = tmp_path / "0.manifest.json"
    assert list(parse_manifest(path.read_bytes(), str(path)).items()) == samples


@pytest.mark.parametrize("shard", ["a/0.tar", "file:a/0.tar", "a/0.tar.gz"])
def test_it_lies_beside_its_shard(shard: str) -> None:
    assert manifest_path(shard) == "a/0.manifest.json"
    assert manifest_path("s3://bucket/0.tar") == "s3://bucket/0.manifest.json"


def test_a_folder_that_cannot_be_written_to_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PermissionError):
        write_manifest(tmp_path / "0.tar", [("a", {})])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"{}", b"\xff", b"[" * 10**5,
        b'{"jettclip_manifest": 2, "samples": {}}',
        b'{"jettclip_manifest": 1, "samples": ["a"]}',
        b'{"jettclip_manifest": 1, "samples": {"a": "jpg"}}',
        b'{"jettclip_manifest": 1, "samples": {"a": {"jpg": 12}}}',
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_an_error_that_says_what_to_do(content: bytes) -> None:
    with pytest.raises(DataError, match=r"0\.manifest\.json is no manifest .* delete .* or write it anew"):
        parse_manifest(content, "0.manifest.json")


def test_a_shard_that_is_as_it_was_is_read_whole() -> None:
    groups, tally = read(CLEAN)
    assert groups == [
        {"__key__": key, "jpg": f"{key} jpg".encode() * 99, "txt": f"{key} txt".encode() * 99} for key in "abcde"
    ]
    assert not tally.dropped
    assert not tally.damaged


@pytest.mark.parametrize(
    ("first", "stop", "found"), [(0, 2, "ab"), (2, 4, "cd"), (3, None, "de"), (4, 9, "e"), (6, 9, "")]
)
def test_slices_are_places_in_the_manifest(first: int, stop: int | None, found: str) -> None:
    bounds = {"first": first} if stop is None else {"first": first, "stop": stop}
    groups, tally = read(without("a.jpg", without("a.txt")), **bounds)
    assert keys(groups) == found.replace("a", "")
    assert tally.dropped == ({MISSING: 1} if "a" in found else {})


def test_reading_stops_when_all_samples_of_a_slice_have_come() -> None:
    data = tar_of(CLEAN)
    damaged = data[: data.index(b"c.jpg")] + b"\1" * 4000
    assert keys(read(damaged, stop=2)[0]) == "ab"
    assert not read(damaged, stop=2)[1].damaged
    assert read(damaged, first=2)[1].damaged
    assert read(damaged, stop=3)[1].dropped == {MISSING: 1}
    assert read(tar_of([*CLEAN, ("f.txt", b"")]), first=2, stop=5)[1].damaged == {"key is not in the manifest": 1}


@pytest.mark.parametrize(
    ("members", "reason", "damage"),
    [
        (changed("b.txt", b"another"), DIFFERS, {}),
        (changed("b.jpg", b""), DIFFERS, {}),
        (without("b.txt"), INCOMPLETE, {}),
        (without("b.jpg", without("b.txt")), MISSING, {}),
        (renamed("b.txt", "../../b.txt"), INCOMPLETE, {"key is not in the manifest": 1}),
        (renamed("b.txt", "b"), INCOMPLETE, {"member name has no key and extension": 1}),
    ],
)
def test_a_sample_that_is_not_what_it_was_is_lost_once_and_for_a_reason(
    members: Members, reason: str, damage: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    groups, tally = read(members)
    assert keys(groups) == "acde"
    assert tally.dropped == {reason: 1}
    assert tally.damaged == damage
    assert (
        "sample b of 000000.tar (if the shard was written anew by another tool, delete 000000.manifest.json"
        in caplog.text
    )


def test_what_the_manifest_lacks_is_counted_and_not_passed_on() -> None:
    groups, tally = read([*CLEAN, ("x.jpg", b"1"), ("x.txt", b"2"), ("y.json", b"3"), ("y.txt", b"4")])
    assert keys(groups) == "abcde"
    assert not tally.dropped
    assert tally.damaged == {"key is not in the manifest": 2}
    groups, tally = read([("a.txt", b"added"), *without("a.txt")], clean=without("a.txt"))
    assert groups[0] == {"__key__": "a", "jpg": CLEAN[0][1]}
    assert tally.damaged == {"member is not in the manifest": 1}


def test_a_second_copy_is_counted_and_takes_the_place_of_a_damaged_first_one() -> None:
    groups, tally = read([*CLEAN, *CLEAN[2:4]])
    assert keys(groups) == "abcde"
    assert tally.damaged == {"member occurs again in the shard": 2}
    assert not tally.dropped
    groups, tally = read([*changed("b.txt", b"cut"), *CLEAN[2:4]])
    assert keys(groups) == "acdeb"
    assert not tally.dropped


def test_members_of_a_sample_need_not_stand_together() -> None:
    groups, tally = read(sorted(CLEAN, key=lambda named: named[0].split(".")[1]))
    assert groups == read(CLEAN)[0]
    assert not tally.dropped
    assert not tally.damaged


@pytest.mark.parametrize("bounds", [[0, 5], [0, 2, 5], [0, 1, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_slices_together_count_all_damage_once(bounds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jettclip.data.manifest.MAX_MEMBER_BYTES", 5000)
    clean = without("c.txt", without("d.txt"))
    members = [
        ("x.txt", b""), *clean[:2], ("x", b""), *clean[:1], *clean[2:4], *clean[:2], ("c.txt", b"3"), *clean[4:6],
        ("d.txt", b"4"), ("e.txt", bytes(6000)), *CLEAN[-2:], ("y.txt", b""), ("b.jpg", b"changed"),
    ]  # fmt: skip
    data = bytearray(tar_of(members))
    for name in (b"x.txt", b"b.jpg", b"d.jpg"):
        data[data.index(name + b"\0") + 120] ^= 0xFF
    damaged, found = Counter[str](), ""
    for first, stop in pairwise(bounds):
        groups, tally = read(bytes(data), clean, first=first, stop=stop)
        damaged += tally.damaged
        found += keys(groups)
    assert damaged == {
        "tar header is damaged": 3,
        "member name has no key and extension": 1,
        "member occurs again in the shard": 4,
        "member is not in the manifest": 2,
        "member is larger than 0 MiB": 1,
        "key is not in the manifest": 1,
    }
    assert found == "ace"


def test_what_waits_for_the_rest_of_a_sample_is_not_kept_in_memory() -> None:
    apart = sorted(CLEAN, key=lambda named: named[0].split(".")[1])
    reader = ManifestReader(manifest_of(CLEAN), WANTED, Tally(), "000000.tar")
    groups = reader.read(io.BytesIO(tar_of(apart)))
    next(groups)
    assert [*reader._read] == ["txt"]  # of the last member only, while five others wait


def test_members_that_nobody_wants_are_not_read_and_make_no_sample_incomplete() -> None:
    clean = [*CLEAN[:2], ("a.npz", b"bomb" * 2000), *CLEAN[2:]]
    data = tar_of(clean)
    asked: list[int] = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    reader = ManifestReader(manifest_of(clean), WANTED, Tally(), "000000.tar")
    assert keys(list(reader.read(Watched(data)))) == "abcde"
    assert 8000 not in asked
    assert keys(read(changed("a.npz", b"other", clean), clean)[0]) == "abcde"
    assert keys(read(data, clean, wanted=frozenset())[0]) == "abcde"


def test_manifests_are_json_of_keys_and_xxh3_digests(tmp_path: Path) -> None:
    write_manifest(tmp_path / "0.tar", manifest_of(CLEAN[:1]).items())
    content = json.loads((tmp_path / "0.manifest.json").read_text())
    assert content == {"jettclip_manifest": 1, "samples": {"a": {"jpg": member_digest(CLEAN[0][1])}}}
    assert member_digest(b"") == "2d06800538d394c2"  # XXH3's published value
