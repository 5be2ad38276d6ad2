from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jettclip.data.augmentation import Augmentation, dump
from jettclip.data.counts import DataError, Tally
from jettclip.data.features import StoreInfo, digest, write_store
from jettclip.data.streams import read_shard
from jettclip.openclip import SimpleTokenizer
from jettclip.prepare.check import ShardChecker, check_shards
from jettclip.prepare.check_report import lines, summary
from jettclip.prepare.clean import clean_shards, write_manifests
from jettclip.prepare.everything import EVERYTHING
from jettclip.prepare.findings import Findings, median, share_over
from jettclip.prepare.key_index import KeyIndex
from jettclip.prepare.writer import write_shard as write_clean_shard
from jettclip.settings import SampleSettings
from support import caption, picture, sample, write_shard, write_shards


def check(urls: str | Sequence[str], workers: int = 1, fix: str = "", **settings: Any) -> Findings:
    urls = urls.split("::") if isinstance(urls, str) else list(urls)
    stores = settings.pop("stores", ())
    checker = partial(ShardChecker, SampleSettings(**settings), ("short", "long"), stores)
    with KeyIndex() as index:
        found = check_shards(urls, checker, index, workers)
        if fix:
            clean_shards(urls, fix, index, workers)
    list(lines(found))
    json.dumps(summary(found))
    return found


def sample_with(number: int, **members: Any) -> dict[str, Any]:
    return {name: value for name, value in (sample(number) | members).items() if value is not None}


def write_features(url: str, count: int, name: str = "t", **changes: Any) -> None:
    """Writes the store of a shard of ordinary samples, the first of them."""
    samples = [sample(i) for i in range(count)]
    parts = {"image": "png", "short": "short_caption", "long": "long_caption"}
    width = changes.get("width", 4)
    features = {part: torch.full((count, width), 1.0) for part in parts}
    digests = {part: [digest(s[member]) for s in samples] for part, member in parts.items()}
    info = StoreInfo(**{"model": "T", "weights_digest": "12", "logit_scale": 9.0, "normalized": True, "preprocess": "", "width": width} | changes)  # fmt: skip  # noqa: E501
    write_store(Path(url).with_suffix(f".{name}.safetensors"), [s["__key__"] for s in samples], features, digests, info)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def read(url: str) -> list[dict[str, Any]]:
    return list(read_shard(url, EVERYTHING, Tally()))


@pytest.mark.parametrize("workers", [1, 2])
def test_clean_shards_are_measured(workers: int, tmp_path: Path) -> None:
    found = check(write_shards(tmp_path, [3, 2]), workers)
    assert found.is_clean
    assert (found.shards, found.samples, found.bad) == (2, 5, 0)
    assert found.widths == found.heights == found.shorter_sides == {16: 5}
    assert found.pixels == 5 * 256
    assert found.image_bytes == sum(len(picture(i)) for i in range(5))
    encode = SimpleTokenizer().encode
    lengths = sorted(len(encode(caption(i))) + 2 for i in range(5))
    assert sorted(found.tokens["long"].elements()) == lengths
    report = summary(found)
    assert report["clean"] is True
    assert report["caption_tokens"]["long"]["median"] == lengths[2]
    assert report["images"]["share_smaller_than_224"] == 1
    assert "\n".join(lines(found)).startswith("2 shards, 5 samples, of which 0 cannot be used\n")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"png": picture(1)[:300]}, "image cannot be decoded"),
        ({"png": b""}, "image is empty"),
        ({"png": b"no picture"}, "image cannot be decoded"),
        ({"png": None}, "image is missing"),
        ({"png": picture(1, size=200)}, "image has too many pixels"),
        ({"long_caption": None}, "long caption is missing"),
        ({"short_caption": " \n"}, "caption is empty"),
        ({"long_caption": b"caf\xe9"}, "caption is not UTF-8"),
        ({"long_caption": None, "json": b'{"long_ca'}, "json cannot be decoded"),
    ],
)
def test_each_fault_is_found_and_fixed_by_leaving_the_sample_out(
    members: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    url = write_shard(tmp_path / "in/0.tar", [sample(0), sample_with(1, **members), sample(2)])
    found = check(url, fix=str(tmp_path / "out"), max_image_pixels=30_000)
    assert found.problems == {reason: 1}
    assert (found.samples, found.bad) == (3, 1)
    assert found.examples[reason].startswith(f"sample 000001 of {url} ({reason}")
    assert f"sample 000001 of {url}" in "\n".join(lines(found))
    assert [group["__key__"] for group in read(str(tmp_path / "out/0.tar"))] == ["000000", "000002"]
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {"0.tar": 2}
    assert check(str(tmp_path / "out/0.tar")).is_clean


def test_a_sample_with_two_faults_is_one_bad_sample(tmp_path: Path) -> None:
    found = check(write_shard(tmp_path / "0.tar", [sample(0), sample_with(1, png=b"x", long_caption=b"\xff")]))
    assert found.problems == {"image cannot be decoded": 1, "caption is not UTF-8": 1}
    assert (found.samples, found.bad) == (2, 1)


@pytest.mark.parametrize(
    ("data", "damage"),
    [
        (b"", "shard is cut short"),
        (b"<html>" * 1000, "tar header is damaged"),
        (bytes(10240), "shard holds no samples"),
        (b"\x1f\x8b" + b"\1" * 2000, "tar header is damaged"),
    ],
)
def test_what_is_no_tar_is_reported_and_leaves_nothing(data: bytes, damage: str, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(data)
    found = check(str(tmp_path / "0.tar"), fix=str(tmp_path / "out"))
    assert damage in found.damaged
    assert found.samples == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sizes.json"]


def test_a_shard_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    good = write_shards(tmp_path, [1])
    found = check([good, str(tmp_path / "gone.tar")], fix=str(tmp_path / "out"))
    assert found.damaged == {"shard cannot be read": 1}
    assert found.samples == 1
    assert "gone.tar" in found.examples["shard cannot be read"]


def test_truncated_tars_keep_what_is_whole(tmp_path: Path) -> None:
    url = write_shards(tmp_path / "in", [5])
    data = Path(url).read_bytes()
    Path(url).write_bytes(data[: data.index(b"000003.long_caption") + 300])
    found = check(url, fix=str(tmp_path / "out"))
    assert found.damaged == {"shard is cut short": 1}
    assert found.problems == {"short caption is missing": 1}  # which stands behind the long one
    assert [group["__key__"] for group in read(str(tmp_path / "out/000000.tar"))] == ["000000", "000001", "000002"]


def test_what_a_manifest_says_is_missing_is_found(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [3])
    assert write_manifests([url], 1) == {}
    write_shard(tmp_path / "000000.tar", [sample(0), sample_with(1, npz=b"new") | {"short_caption": "changed"}])
    found = check(url)
    assert found.problems == {"sample differs from the manifest": 1, "sample of the manifest is missing": 1}
    assert found.damaged == {"member is not in the manifest": 1}
    assert (found.samples, found.bad) == (3, 2)


def test_duplicate_keys_within_a_shard_and_across_shards(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "in/0.tar", [sample(0), sample(1), sample(0)])
    two = write_shard(tmp_path / "in/1.tar", [sample(2), sample(1), sample_with(0, png=picture(77))])
    found = check([one, two], fix=str(tmp_path / "out"))
    assert found.damaged == {"key occurs again later in the shard": 1}
    assert found.problems == {"sample is in an earlier shard too": 1}
    assert +found.noted == {"key of another image in an earlier shard": 1}
    assert found.bad == 1
    assert [group["__key__"] for group in read(str(tmp_path / "out/1.tar"))] == ["000002", "000000"]
    assert check([str(tmp_path / "out/0.tar"), str(tmp_path / "out/1.tar")]).is_clean


def test_stores_are_held_against_the_shards(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3, 2, 2]).split("::")
    write_features(urls[0], 3)
    assert check(urls[:1], stores=["t"]).is_clean
    write_shard(Path(urls[0]), [sample(0), sample_with(1, short_caption="changed"), sample(9)])
    (tmp_path / "000001.t.safetensors").write_bytes(b"\0" * 50)
    found = check(urls, stores=["t"]).stores["t"]
    assert found.problems == {
        "short feature is stale, the short has changed since": 1,
        "image feature is missing": 1,
        "short feature is missing": 1,
        "long feature is missing": 1,
        "feature store cannot be read": 1,
        "feature store is missing": 1,
    }
    assert found.unused == 1
    assert found.norms["image"].summary() == {"rows": 2, "min": 2.0, "mean": 2.0, "max": 2.0}
    assert found.teachers == {"T (12), width 4, float32": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"width": 8},
        {"weights_digest": "12345678 and so on"},
        {"logit_scale": 8.0},
        {"preprocess": '{"size": 24}'},
        {"normalized": False},
        {"members": '[["T", 4, 9.0]]'},
    ],
)
def test_stores_of_another_teacher_than_the_first_are_a_fault(change: dict[str, Any], tmp_path: Path) -> None:
    urls = [write_shard(tmp_path / f"{i}.tar", [sample(0), sample(i)]) for i in (1, 2, 3)]
    for url in urls[:2]:
        write_features(url, 1, weights_digest="12345678")
    write_features(urls[2], 1, **{"weights_digest": "12345678"} | change)
    found = check(urls, stores=["t"])
    assert found.stores["t"].problems["feature store is of another teacher"] == 1
    example = found.examples["feature store is of another teacher"]
    assert f"{tmp_path}/3.t.safetensors: {{'{next(iter(change))}': " in example
    assert example.endswith(f"(here, in {tmp_path}/1.t.safetensors)")


def test_a_store_of_another_number_format_is_a_fault(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [1, 1]).split("::")
    for url, number, dtype in zip(urls, (0, 1), (torch.float32, torch.bfloat16), strict=True):
        digests = {"long": [digest(caption(number))]}
        info = StoreInfo("T", "12", 9.0, True, "", 4)
        path = Path(url).with_suffix(".t.safetensors")
        write_store(path, [f"{number:06d}"], {"long": torch.ones(1, 4)}, digests, info, dtype=dtype)
    assert check(urls, stores=["t"]).stores["t"].problems == {"feature store is of another number format": 1}


def write_augmented(url: str, size: int = 16) -> bytes:
    """Writes the store of a shard of two ordinary samples, with 3 augmentations and 2 captions; returns its bytes."""
    images = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4) + 100
    digests = [digest(picture(i)) for i in range(2)]
    drawn = [dump([Augmentation((0, n, 9, 16 - n), ((6 + i, 0.5),)) for n in range(3)]) for i in range(2)]
    path = Path(url).with_suffix(".t.safetensors")
    info = StoreInfo("T", "12", 9.0, True, "", 4, augmentation='{"magnitude": 9}')
    keys = ["000000", "000001"]
    sizes = [(16, 16), (size, size)]
    write_store(path, keys, {"image": images}, {"image": digests}, info, augmentations=drawn, image_sizes=sizes)
    return path.read_bytes()


def test_every_augmentation_of_an_image_is_read(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    whole, path = write_augmented(url), tmp_path / "000000.t.safetensors"
    found = check(url, stores=["t"])
    assert found.is_clean
    assert found.stores["t"].norms["image"].count == 6
    path.write_bytes(whole.replace(np.float32(116).tobytes(), np.float32(16).tobytes()))  # of the second one's second
    found = check(url, stores=["t"])
    assert found.stores["t"].problems == {"image feature is damaged": 1}
    assert found.examples["image feature is damaged"].startswith(f"sample 000001 of {url} (")
    path.write_bytes(whole.replace(b"[[0,2,9,14],[[7,0.5]]]", b"[[0,2,9,14],[[99,0.5]]]"))
    assert check(url, stores=["t"]).stores["t"].problems == {"stored augmentation cannot be read": 1}
    write_augmented(url, size=20)
    reason = "image is of another size than its stored augmentation was drawn for"
    assert set(check(url, stores=["t"]).stores["t"].problems) == {reason}


def test_every_caption_of_a_sample_is_looked_up(tmp_path: Path) -> None:
    url = write_shard(tmp_path / "0.tar", [sample(0, png=picture(0), json={"all": ["a dog", "a cat"]})])
    fields = {"long_caption_field": "json:all"}
    info = StoreInfo("T", "12", 9.0, True, "", 4)
    for texts, problems in ((["a dog", "a cat"], 0), (["a dog", "a cow"], 1)):
        digests = {"long": [[digest(text) for text in texts]]}
        write_store(tmp_path / "0.t.safetensors", ["000000"], {"long": torch.ones(1, 2, 4)}, digests, info)
        found = check(url, stores=["t"], **fields).stores["t"]
        assert found.problems.total() == problems
        assert found.norms["long"].count == 2 - problems


def test_what_is_wrong_with_a_store_comes_with_its_remedy(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    write_features(url, 2)
    write_features(url, 1, name="u")
    said = "\n".join(lines(check(url, stores=["t", "u"])))
    assert "extract store 'u' again with --overwrite; --fix mends shards, not stores" in said
    assert "extract store 't'" not in said


def test_features_that_are_not_finite_are_a_fault(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    write_features(url, 2)
    path = tmp_path / "000000.t.safetensors"
    rows = load_file(path)
    rows["image"][1, 0, 2] = float("nan")
    rows["image_check"][1, 0] = 0
    with safe_open(path, "pt") as file:
        save_file(rows, path, file.metadata())
    assert check(url, stores=["t"]).stores["t"].problems == {"image feature is not finite": 1}


def test_a_feature_with_a_flipped_bit_is_a_fault(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    write_features(url, 2)
    path = tmp_path / "000000.t.safetensors"
    path.write_bytes(path.read_bytes().replace(np.float32(1).tobytes(), np.float32(1.5).tobytes(), 1))
    found = check(url, stores=["t"]).stores["t"]
    assert found.problems.total() == 1
    assert "feature is damaged" in next(iter(found.problems))


def test_members_that_nobody_reads_are_copied_and_never_opened(tmp_path: Path) -> None:
    bombs = {"npz": b"PK\3\4" + b"\xff" * 999, "pth.gz": b"\x1f\x8b\xff", "pickle": b"cos\nsystem\n(S'touch x'\ntR."}
    url = write_shard(tmp_path / "in/0.tar", [sample(0) | bombs])
    assert check(url, fix=str(tmp_path / "out")).is_clean
    assert read(str(tmp_path / "out/0.tar"))[0].items() >= bombs.items()


def test_cleaned_shards_are_the_same_every_time_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [
        write_shard(tmp_path / f"in/{i}.tar", [sample(3 * i), sample_with(9, png=b"x"), sample(3 * i + 1)])
        for i in (0, 1)
    ]
    check(urls, workers=2, fix=str(tmp_path / "a"))
    check(urls, workers=1, fix=str(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == ["0.manifest.json", "0.tar", "1.manifest.json", "1.tar", "sizes.json"]
    check(urls, fix=str(tmp_path / "a"))  # again, over what is there
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        check(urls, fix=str(tmp_path / "c"))
    assert not list((tmp_path / "c").iterdir())


def test_the_copy_of_a_shard_of_which_nothing_is_left_is_removed(tmp_path: Path) -> None:
    one, two = write_shards(tmp_path / "in", [2, 2]).split("::")
    check([one, two], fix=str(tmp_path / "out"))
    write_shard(Path(one), [sample_with(0, png=b"x")])
    check([one, two], fix=str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == ["000001.manifest.json", "000001.tar", "sizes.json"]
    os.remove(two)  # of what cannot be read now, the copy may be all that there is
    check([one, two], fix=str(tmp_path / "out"))
    assert "000001.tar" in os.listdir(tmp_path / "out")


def test_originals_are_never_overwritten(tmp_path: Path) -> None:
    url = write_shards(tmp_path / "a", [1])
    with pytest.raises(DataError, match="would be overwritten"):
        check(url, fix=str(tmp_path / "b/../a"))
    other = write_shards(tmp_path / "b", [1])
    with pytest.raises(DataError, match="would share one"):
        check([url, other], fix=str(tmp_path / "c"))


def test_only_whole_shards_get_manifests(tmp_path: Path) -> None:
    good, cut, empty = write_shards(tmp_path, [2, 2, 0]).split("::")
    Path(cut).write_bytes(Path(cut).read_bytes()[:1500])
    answer = write_manifests([good, cut, empty, str(tmp_path / "gone.tar"), "pipe:cat x"], 2)
    assert answer.keys() == {cut, empty, str(tmp_path / "gone.tar"), "pipe:cat x"}
    assert "shard is cut short 1" in answer[cut]
    assert (tmp_path / "000000.manifest.json").exists()
    assert check(good).is_clean
    assert len(list(tmp_path.glob("*.manifest.json"))) == 1


def test_a_manifest_is_written_anew_whatever_the_old_one_says(tmp_path: Path) -> None:
    url = write_shards(tmp_path, [2])
    write_manifests([url], 1)
    write_shard(Path(url), [sample(5)])
    assert not check(url).is_clean
    write_manifests([url], 1)
    assert check(url).is_clean


def test_a_caption_of_a_million_letters_does_not_take_for_ever(tmp_path: Path) -> None:
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghij"), 10**6))
    samples = [sample_with(0, long_caption=letters[:90_000]), sample_with(1, long_caption=letters)]
    found = check(write_shard(tmp_path / "0.tar", samples))
    assert max(found.tokens["long"]) > 10_000
    assert found.problems == {"caption is absurdly long": 1}


def test_a_written_shard_has_its_manifest_and_replaces_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    assert write_clean_shard(path, [{"__key__": "a", "__shard__": "s", "txt": b"one", "jpg": b""}]) == 1
    assert read(str(path)) == [{"__key__": "a", "__shard__": str(path), "txt": b"one", "jpg": b""}]
    assert write_clean_shard(path, []) == 0  # an old shard is not taken away
    assert sorted(os.listdir(tmp_path)) == ["0.manifest.json", "0.tar"]
    long = "folder/" * 40 + "a"
    assert write_clean_shard(path, [{"__key__": long, "txt": b"two"}]) == 1
    assert [group["__key__"] for group in read(str(path))] == [long]


def test_medians_and_shares_are_those_of_the_values() -> None:
    values = [1, 1, 2, 5, 9, 9]
    assert median(Counter(values)) == 2
    assert median(Counter(values[:5])) == 2
    assert median(Counter()) == 0
    assert share_over(Counter(values), 5) == 2 / 6
    assert share_over(Counter(), 5) == 0
