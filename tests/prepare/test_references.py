from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jettclip.data.counts import DataError, Tally
from jettclip.data.manifest import write_manifest
from jettclip.data.streams import read_shard
from jettclip.prepare.build import build_shards
from jettclip.prepare.settings import BuildSettings
from support import picture, sample, write_shard


class _All(frozenset[str]):
    def __contains__(self, extension: object) -> bool:
        return True


def build(source: str, output: Path, **changes: Any) -> dict[str, Any]:
    settings = BuildSettings(source, str(output), **{"workers": 2, "shard_size": 4} | changes)
    assert not settings.problems()
    build_shards(settings)
    report = json.loads((output / "report.json").read_text())
    assert report["read"] == report["written"] + sum(drops(report).values())
    return report


def drops(report: dict[str, Any]) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in report["dropped"].items()}


def groups(folder: Path) -> list[dict[str, Any]]:
    found = [group for shard in sorted(folder.glob("*.tar")) for group in read_shard(str(shard), _All(), Tally())]
    return [{name: value for name, value in group.items() if name != "__shard__"} for group in found]


def numbers(folder: Path) -> list[int]:
    return [int(group["__key__"]) for group in groups(folder)]


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def full(number: int, **members: Any) -> dict[str, Any]:
    """Returns a sample with members of every kind."""
    named: dict[str, Any] = {
        "png": picture(number),
        "txt": f"thing {number}",
        "cls.gz": b"\0\xff",
        "json": {"n": number},
    }
    return sample(number, **named | members)


def shards(folder: Path, sizes: list[int]) -> str:
    first = 0
    for index, size in enumerate(sizes):
        write_shard(folder / f"{index:03d}.tar", [full(first + number) for number in range(size)])
        first += size
    return f"{folder}/{{000..{len(sizes) - 1:03d}}}.tar"


def test_shards_are_cut_anew_with_all_their_members(tmp_path: Path) -> None:
    source = shards(tmp_path / "in", [3, 5, 2])
    report = build(source, tmp_path / "out")
    assert (report["written"], drops(report)) == (10, {})
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {
        "000000.tar": 4, "000001.tar": 4, "000002.tar": 2,
    }  # fmt: skip
    assert groups(tmp_path / "out") == groups(tmp_path / "in")


def test_pictures_are_made_anew_and_the_json_says_their_new_size(tmp_path: Path) -> None:
    samples = [full(0, json={"width": 32, "height": 32, "n": 0}, png=picture(0, 32)), full(1), full(2, png=b"broken")]
    source = write_shard(tmp_path / "in/0.tar", samples)
    report = build(source, tmp_path / "out", max_side=16)
    assert drops(report) == {"image cannot be decoded": 1}
    first, second = groups(tmp_path / "out")
    assert list(first) == ["__key__", "jpg", "txt", "cls.gz", "json"]
    assert json.loads(first["json"]) == {"width": 16, "height": 16, "n": 0}
    assert second == groups(tmp_path / "in")[1]
    build(source, tmp_path / "small", min_side=17)
    assert numbers(tmp_path / "small") == [0]


def test_keys_are_kept_and_dropped_by_files(tmp_path: Path) -> None:
    source = shards(tmp_path / "in", [3, 5])
    (tmp_path / "keep.txt").write_text("".join(f"{number:06d}\n" for number in (1, 2, 4, 6, 99)))
    (tmp_path / "drop.txt").write_text("000002\n")
    report = build(source, tmp_path / "out", keep_keys=str(tmp_path / "keep.txt"), drop_keys=str(tmp_path / "drop.txt"))
    assert numbers(tmp_path / "out") == [1, 4, 6]
    assert drops(report) == {"not in --keep-keys": 4, "in --drop-keys": 1}


def test_a_key_that_occurs_again_is_counted_wherever_it_stands(tmp_path: Path) -> None:
    write_shard(tmp_path / "in/0.tar", [full(0), full(1), full(0)])
    write_shard(tmp_path / "in/1.tar", [full(1), full(2)])
    report = build(f"{tmp_path}/in/{{0..1}}.tar", tmp_path / "out")
    assert numbers(tmp_path / "out") == [0, 1, 2]
    assert drops(report) == {"duplicate key": 2}


def test_damage_and_samples_without_a_picture_are_counted(tmp_path: Path) -> None:
    source = write_shard(tmp_path / "in/0.tar", [full(0), sample(1, txt="no picture"), full(2), full(3)])
    data = Path(source).read_bytes()
    Path(source).write_bytes(data[: len(data) * 15 // 16 // 512 * 512 - 4096])
    report = build(source, tmp_path / "out")
    assert drops(report)["no image in the sample"] == 1
    assert report["damaged"]["shard is cut short"] == 1


@pytest.mark.parametrize("holdout", [0, 2])
def test_what_a_manifest_misses_or_finds_changed_is_dropped(holdout: int, tmp_path: Path) -> None:
    from jettclip.data.manifest import member_digest

    samples = [full(number) for number in range(5)]
    source = write_shard(tmp_path / "in/0.tar", [samples[0], full(1, txt="changed"), *samples[3:]])
    names = [(s["__key__"], {"png": member_digest(s["png"]), "txt": member_digest(s["txt"].encode())}) for s in samples]
    write_manifest(source, names)
    report = build(source, tmp_path / "out", holdout=holdout, holdout_way="hash")
    assert drops(report) == {"sample cannot be read whole": 1, "sample of the manifest is missing": 1}
    assert report["written"] == 3


def reinforced(number: int, **changes: Any) -> dict[str, Any]:
    """Returns a sample of DataCompDR, which has neither picture nor caption."""
    members = {"paug.json": {"param_aug": "[]"}, "syn.json": {"syn_text": [f"{number}"]}, "npz": b"\x01",
               "json": {"uid": f"{number:06d}", "sha256": "ab"}}  # fmt: skip
    return sample(number, **members | changes)


def test_shards_are_joined_by_key_one_by_one_whatever_the_order(tmp_path: Path) -> None:
    source = shards(tmp_path / "in", [4, 3])
    write_shard(tmp_path / "dr/000.tar", [reinforced(number) for number in (3, 0, 1, 77)])
    write_shard(tmp_path / "dr/001.tar", [reinforced(number) for number in (2, 6, 5, 4)])
    report = build(source, tmp_path / "out", join=f"{tmp_path}/dr/{{000..001}}.tar")
    assert drops(report) == {"no partner to join": 1}  # 2, which stands in the other shard
    assert numbers(tmp_path / "out") == [0, 1, 3, 4, 5, 6]
    for group in groups(tmp_path / "out"):
        number = int(group["__key__"])
        assert group["png"] == picture(number)
        assert json.loads(group["syn.json"]) == {"syn_text": [f"{number}"]}
        assert json.loads(group["json"]) == {"n": number, "uid": f"{number:06d}", "sha256": "ab"}
        assert set(group) == {"__key__", "png", "txt", "cls.gz", "json", "paug.json", "syn.json", "npz"}


def test_the_key_to_join_by_may_stand_in_the_json_and_becomes_the_key(tmp_path: Path) -> None:
    samples = [sample(number, png=picture(number), json={"uid": f"u{number}"}) for number in range(4)]
    samples += [sample(4, png=picture(4)), sample(5, png=picture(5), json={"uid": "a/b.c"}), sample(6, json="[1]")]
    source = write_shard(tmp_path / "in/0.tar", samples)
    partners = [{**reinforced(number), "__key__": f"u{number}"} for number in (2, 1, 0)]
    join = write_shard(tmp_path / "dr/0.tar", partners)
    report = build(source, tmp_path / "out", join=join, join_key="json:uid")
    assert [group["__key__"] for group in groups(tmp_path / "out")] == ["u0", "u1", "u2"]
    assert [group["png"] for group in groups(tmp_path / "out")] == [picture(number) for number in range(3)]
    assert drops(report) == {"no partner to join": 1, "no key to join by": 2, "json cannot be decoded": 1}


def test_pictures_with_stored_augmentation_are_never_resized(tmp_path: Path) -> None:
    source = shards(tmp_path / "in", [2])
    join = write_shard(tmp_path / "dr/0.tar", [reinforced(number) for number in range(2)])
    with pytest.raises(DataError, match=r"stored augmentation \(paug.json\), .*; leave out --max-side") as raised:
        build(source, tmp_path / "out", join=join, max_side=8)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert build(source, tmp_path / "out", join=join)["written"] == 2


def test_a_shard_that_changed_is_read_anew(tmp_path: Path) -> None:
    source = shards(tmp_path / "in", [4, 4])
    build(source, tmp_path / "out")
    write_shard(tmp_path / "in/001.tar", [full(number, txt="new") for number in range(4, 8)])
    assert build_shards(BuildSettings(source, str(tmp_path / "out"), workers=1, shard_size=4)).kept == 1
    assert [group["txt"] for group in groups(tmp_path / "out")][4:] == [b"new"] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"join": "a/{0..2}.tar"}, "--join names 3 shards and --input 1; they are joined one by one"),
        ({"join": "gone.tar"}, "shard 'gone.tar' does not exist; check the braces"),
        ({"input": "pipe:cat x.tar"}, "would run a shell command"),
        ({"output": "in"}, "--output would overwrite the shard .*, which is read; name another folder"),
    ],
)
def test_shards_that_cannot_be_read_or_would_be_overwritten_are_refused(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    source = write_shard(tmp_path / "in/000000.tar", [full(0)])
    before = Path(source).read_bytes()
    output = tmp_path / changes.pop("output", "out")
    with pytest.raises(DataError, match=message):
        build(changes.pop("input", source), output, input_type="shards", **changes)
    assert Path(source).read_bytes() == before


def test_pictures_are_told_apart_across_splits_by_their_bytes(tmp_path: Path) -> None:
    samples = [full(number, png=picture(number % 3)) for number in range(6)]
    report = build(write_shard(tmp_path / "in/0.tar", samples), tmp_path / "out", holdout=1)
    assert drops(report) == {"duplicate image digest across splits": 1}
    assert numbers(tmp_path / "out/train") == [1, 2, 4, 5]
    assert np.array_equal(numbers(tmp_path / "out/holdout"), [0])


def test_a_sample_made_anew_keeps_one_picture_the_one_that_was_chosen(tmp_path: Path) -> None:
    both = sample(0, jpg=jpeg(2), png=picture(1), txt="two pictures", json={"n": 0})
    source = write_shard(tmp_path / "in/0.tar", [both])
    build(source, tmp_path / "plain")
    assert set(groups(tmp_path / "plain")[0]) == {"__key__", "png", "jpg", "txt", "json"}
    build(source, tmp_path / "out", reencode=True, image_format="png")
    (group,) = groups(tmp_path / "out")
    assert set(group) == {"__key__", "png", "txt", "json"}
    with Image.open(io.BytesIO(group["png"])) as made, Image.open(io.BytesIO(both["jpg"])) as chosen:
        assert np.array_equal(np.asarray(made), np.asarray(chosen))


@pytest.mark.parametrize("joined", [False, True])
def test_samples_are_found_where_a_manifest_has_them_in_another_order(joined: bool, tmp_path: Path) -> None:
    from jettclip.data.manifest import member_digest

    samples = [full(number) for number in range(6)]
    source = write_shard(tmp_path / "in/0.tar", samples)
    names = [(s["__key__"], {"png": member_digest(s["png"]), "txt": member_digest(s["txt"].encode())}) for s in samples]
    write_manifest(source, names[::-1])
    changes: dict[str, Any] = {}
    if joined:
        changes["join"] = source
        source = write_shard(tmp_path / "other/0.tar", [sample(number, npz=b"x") for number in (5, 4, 3, 2, 1, 0)])
    report = build(source, tmp_path / "out", shard_size=2, **changes)
    assert (report["written"], drops(report)) == (6, {})
