from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jettclip.data.augmentation import Augmentation, dump
from jettclip.data.captions import Caption, CaptionReader
from jettclip.data.counts import DataError, Dropped, Tally
from jettclip.data.features import PARTS, Store, digest, write_store
from jettclip.data.store_group import OPEN_SHARDS, StoreGroup, open_stores
from jettclip.settings import SampleSettings
from jettclip.types import TeacherInfo
from stores import KEYS, WIDTH, content, contents, features, group, info, write, write_reinforced


def open_group(folder: Path, names: Sequence[str] = ("vit",), on_missing: str = "error", shards: int = 1) -> StoreGroup:
    return open_stores([f"{folder}/{index:06d}.tar" for index in range(shards)], names, "", on_missing)


def first(count: int) -> int:
    return 0


def last(count: int) -> int:
    return count - 1


def test_rows_are_joined_by_key_and_not_by_position(tmp_path: Path) -> None:
    rows = features()
    order = [2, 0, 1]
    write(tmp_path / "000000.vit.safetensors", rows)
    write(tmp_path / "000001.vit.safetensors", {p: r[order] for p, r in rows.items()}, [KEYS[i] for i in order])
    stores = open_group(tmp_path, shards=2)
    assert not stores.has_augmentations
    for key in KEYS:
        for shard in range(2):
            found = stores.lookup(group(f"{tmp_path}/{shard:06d}.tar", key), contents(key), first)
            assert found.augmentation is None
            for part, row in found.features._asdict().items():
                assert torch.equal(row, rows[part][KEYS.index(key)])


def test_several_teachers_stand_side_by_side(tmp_path: Path) -> None:
    small = write(tmp_path / "000000.vit.safetensors")
    large = write(tmp_path / "000000.big.safetensors", features(6, seed=1), width=6, model="Big", logit_scale=50.0)
    write(tmp_path / "000000.two.safetensors", features(5), width=5, members='[["a", 2, 60.0], ["b", 3, 70.0]]')
    stores = open_group(tmp_path, ["vit", "big", "two"])
    found = stores.lookup(group(f"{tmp_path}/000000.tar", "b"), contents("b"), first).features
    for part, row in found._asdict().items():
        assert torch.equal(row, torch.cat([small[part][1], large[part][1], features(5)[part][1]]))
    assert stores.teachers == [
        TeacherInfo("vit", WIDTH, 100 / 3),
        TeacherInfo("big", 6, 50.0),
        TeacherInfo("two/a", 2, 60.0),
        TeacherInfo("two/b", 3, 70.0),
    ]


def test_number_formats_of_several_teachers_are_joined_in_the_wider_one(tmp_path: Path) -> None:
    rows = features()
    digests = {part: [digest(content(part, key)) for key in KEYS] for part in PARTS}
    for name, dtype in {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "int8": torch.int8,
    }.items():
        write_store(tmp_path / f"000000.{name}.safetensors", KEYS, rows, digests, info(), dtype=dtype)
    shard = f"{tmp_path}/000000.tar"
    for names, dtype in {
        ("bf16", "bf16"): torch.bfloat16,
        ("fp16", "fp16"): torch.float16,
        ("bf16", "fp32"): torch.float32,
        ("bf16", "fp16"): torch.float32,
        ("int8",): torch.float32,
        ("bf16", "int8"): torch.float32,
    }.items():
        found = open_group(tmp_path, names).lookup(group(shard, "c"), contents("c"), first).features.long
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found[:WIDTH].bfloat16(), rows["long"][2]) or "int8" in names
        torch.testing.assert_close(found[-WIDTH:].float(), rows["long"][2].float(), atol=0.02, rtol=0)


def test_only_the_parts_that_are_asked_for_are_read(tmp_path: Path) -> None:
    write(tmp_path / "000000.vit.safetensors", {"long": features()["long"]})
    found = open_group(tmp_path).lookup(group(f"{tmp_path}/000000.tar", "a"), contents("a", ["long"]), first).features
    assert found.image is None
    assert found.short is None
    assert found.long is not None


AUGMENTATIONS = [
    [Augmentation((row, which, 100, 200), ((6, 0.25), None)) for which in range(7)] for row in range(len(KEYS))
]
DUMPED = [dump(its) for its in AUGMENTATIONS]


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_the_row_of_the_chosen_caption_travels_with_it(dtype: torch.dtype | None, tmp_path: Path) -> None:
    path = tmp_path / "000000.vit.safetensors"
    rows = write_reinforced(path, DUMPED, captions=5, dtype=dtype)
    stores, file = open_group(tmp_path), load_file(path)
    generator = random.Random(0)
    order = [(key, index) for key in KEYS for index in range(5)]
    generator.shuffle(order)
    for key, index in order:
        chosen = contents(key) | {"short": contents(key, index=(index + 2) % 5)["short"]}
        chosen["long"] = Caption(str(content("long", key, index)), "another place", generator.randrange(9))
        found = stores.lookup(group(f"{tmp_path}/000000.tar", key), chosen, last).features
        row = KEYS.index(key)
        for part, column in {"image": 6, "short": (index + 2) % 5, "long": index}.items():
            expected = rows[part][row, column]
            if dtype == torch.int8:
                expected = file[part][row, column].float() * file[f"{part}_scale"][row, column]
            assert torch.equal(getattr(found, part), expected)
    unknown = contents("a") | {"long": Caption(str(content("long", "b")), "long_caption")}
    with pytest.raises(DataError, match="long feature is stale, the long has changed since"):
        stores.lookup(group(f"{tmp_path}/000000.tar", "a"), unknown, first)


def test_the_augmentation_that_is_picked_comes_with_its_row(tmp_path: Path) -> None:
    rows = write_reinforced(tmp_path / "000000.vit.safetensors", DUMPED)
    stores = open_group(tmp_path)
    assert stores.has_augmentations
    counts = []
    for which in range(7):

        def pick(count: int, which: int = which) -> int:
            counts.append(count)
            return which

        found = stores.lookup(group(f"{tmp_path}/000000.tar", "b"), contents("b"), pick)
        assert found.features.image is not None
        assert torch.equal(found.features.image, rows["image"][1, which])
        assert found.augmentation is not None
        assert found.augmentation.augmentation == AUGMENTATIONS[1][which]
        assert found.augmentation.drawn_for == (300, 400)
    assert counts == [7] * 7
    text = stores.lookup(group(f"{tmp_path}/000000.tar", "b"), contents("b", ["short", "long"]), pick)
    assert text.augmentation is None
    assert counts == [7] * 7


def test_several_teachers_must_have_seen_the_same_augmentations(tmp_path: Path) -> None:
    one = write_reinforced(tmp_path / "000000.one.safetensors", DUMPED)
    two = write_reinforced(tmp_path / "000000.two.safetensors", DUMPED, seed=1)
    other = [*DUMPED[:1], DUMPED[1].replace("0.25", "0.5"), *DUMPED[2:]]
    write_reinforced(tmp_path / "000000.other.safetensors", other)
    write_reinforced(tmp_path / "000000.size.safetensors", DUMPED, image_sizes=[(300, 400), (300, 401), (300, 400)])
    write(tmp_path / "000000.none.safetensors")
    sample = group(f"{tmp_path}/000000.tar", "b")
    found = open_group(tmp_path, ["one", "two"]).lookup(sample, contents("b"), last).features.image
    assert found is not None
    assert torch.equal(found, torch.cat([one["image"][1, 6], two["image"][1, 6]]))
    for name in ("other", "size", "none"):
        for names in (["one", name], [name, "one"]):
            with pytest.raises(DataError, match="teachers saw different augmentations.*same augmentations and seed"):
                open_group(tmp_path, names).lookup(sample, contents("b"), first)
            with pytest.raises(Dropped, match="teachers saw different augmentations"):
                open_group(tmp_path, names, "drop").lookup(sample, contents("b"), first)
            open_group(tmp_path, names).lookup(sample, contents("b", ["long"]), first)


def test_a_caption_of_a_random_policy_has_no_features(tmp_path: Path) -> None:
    write(tmp_path / "000000.vit.safetensors")
    sample = group(f"{tmp_path}/000000.tar", "a")
    settings = SampleSettings(short_caption_policy="sample-sentences")
    tally = Tally()
    made = CaptionReader(settings, ["short"]).read({"__key__": "a", "long_caption": b"One. Two. Three."}, 0, tally)
    with pytest.raises(DataError, match="captions of a random policy have no short features"):
        open_group(tmp_path).lookup(sample, contents("a") | made, first)
    with pytest.raises(DataError, match="image feature is stale"):
        open_group(tmp_path).lookup(sample, {"image": b"another", **made}, first)
    made = CaptionReader(SampleSettings(), ["short"]).read(
        {"__key__": "a", "long_caption": b"One. Two. Three."}, 0, tally
    )
    with pytest.raises(DataError, match="short feature is stale"):
        open_group(tmp_path).lookup(sample, contents("a") | made, first)


def _missing_file(folder: Path) -> None:
    (folder / "000001.vit.safetensors").unlink()


def _missing_row(folder: Path) -> None:
    write(folder / "000001.vit.safetensors", {p: r[:1] for p, r in features().items()}, KEYS[:1])


def _missing_part(folder: Path) -> None:
    write(folder / "000001.vit.safetensors", {p: r for p, r in features().items() if p != "long"})


def _stale(part: str, folder: Path) -> None:
    digests = {p: [digest("another" if p == part else content(p, key)) for key in KEYS] for p in PARTS}
    write_store(folder / "000001.vit.safetensors", KEYS, features(), digests, info())


def _stale_caption(folder: Path) -> None:
    _stale("short", folder)


def _stale_image(folder: Path) -> None:
    _stale("image", folder)


def _wrong_width(folder: Path) -> None:
    write(folder / "000001.vit.safetensors", width=6)


def _wrong_model(folder: Path) -> None:
    write(folder / "000001.vit.safetensors", weights_digest="34cd")


def _nan(folder: Path) -> None:
    rows = features()
    rows["long"][1, 2] = float("nan")
    write(folder / "000001.vit.safetensors", rows)


def _truncated(folder: Path) -> None:
    path = folder / "000001.vit.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def _empty(folder: Path) -> None:
    (folder / "000001.vit.safetensors").write_bytes(b"")


def _foreign(folder: Path) -> None:
    save_file({"image": torch.zeros(3, 1, WIDTH)}, folder / "000001.vit.safetensors")


def _old_format(folder: Path, name: str = "000001.vit.safetensors") -> None:
    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata() | {"jettclip_store": "1"}
    save_file(load_file(folder / name), folder / name, metadata)


def _fewer_rows_than_keys(folder: Path) -> None:
    path = folder / "000001.vit.safetensors"
    tensors = {name: rows[:2].contiguous() for name, rows in load_file(path).items()}
    metadata = {name: str(value) for name, value in info().__dict__.items()}
    save_file(tensors, path, metadata | {"jettclip_store": "2", "keys": json.dumps(KEYS)})


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_missing_file, "feature store is missing"),
        (_missing_row, "image feature is missing"),
        (_missing_part, "long feature is missing"),
        (_stale_caption, "short feature is stale, the short has changed since"),
        (_stale_image, "image feature is stale, the image has changed since"),
        (_wrong_width, "feature store is of another teacher"),
        (_wrong_model, "feature store is of another teacher"),
        (_nan, "long feature is not finite"),
        (_truncated, "feature store cannot be read"),
        (_empty, "feature store cannot be read"),
        (_foreign, "feature store cannot be read"),
        (_old_format, "feature store cannot be read"),
        (_fewer_rows_than_keys, "feature store cannot be read"),
    ],
)
def test_a_bad_row_is_an_error_naming_shard_and_key_or_a_drop_with_its_reason(
    harm: Any, reason: str, tmp_path: Path
) -> None:
    for index in range(2):
        write(tmp_path / f"{index:06d}.vit.safetensors")
    strict = open_group(tmp_path, shards=2)
    harm(tmp_path)
    lenient = open_group(tmp_path, shards=2, on_missing="drop")
    shard = f"{tmp_path}/000001.tar"
    for _ in range(2):  # what was found wrong with a shard holds for its next sample
        with pytest.raises(
            DataError,
            match=rf"000001\.tar, sample b: {reason}.*--overwrite.*--on-missing-features drop",
        ):
            strict.lookup(group(shard, "b"), contents("b"), first)
        with pytest.raises(Dropped) as dropped:
            lenient.lookup(group(shard, "b"), contents("b"), first)
        assert dropped.value.reason == reason
    whole = lenient.lookup(group(f"{tmp_path}/000000.tar", "b"), contents("b"), first)
    assert whole.features.image is not None


def test_a_missing_store_is_found_before_training(tmp_path: Path) -> None:
    write(tmp_path / "000000.vit.safetensors")
    with pytest.raises(DataError, match=r"1 of 2 stores of 'vit' are missing, the first is .*000001\.vit\.safetensors"):
        open_group(tmp_path, shards=2)
    with pytest.raises(DataError, match="2 of 2 stores of 'typo' are missing"):
        open_group(tmp_path, ["typo"], "drop", shards=2)


@pytest.mark.parametrize("harm", [_truncated, _empty, _foreign, _old_format])
def test_a_first_store_that_cannot_be_read_is_found_before_training(harm: Any, tmp_path: Path) -> None:
    write(tmp_path / "000001.vit.safetensors")
    harm(tmp_path)
    with pytest.raises(DataError, match=r"000001\.vit\.safetensors.*extract it again"):
        open_stores([f"{tmp_path}/000001.tar"], ["vit"], "", "error")


@pytest.mark.parametrize("harm", [_truncated, _empty, _foreign, _old_format])
def test_a_first_store_that_cannot_be_read_is_passed_over_where_samples_may_be_lost(harm: Any, tmp_path: Path) -> None:
    write(tmp_path / "000001.vit.safetensors")
    write(tmp_path / "000002.vit.safetensors")
    harm(tmp_path)
    shards = [f"{tmp_path}/00000{number}.tar" for number in (1, 2)]
    assert open_stores(shards, ["vit"], "", "drop").expected == [info()]
    with pytest.raises(DataError, match="extract it again"):
        open_stores(shards[:1], ["vit"], "", "drop")


def test_what_a_crash_left_behind_is_not_taken_for_a_store(tmp_path: Path) -> None:
    write(tmp_path / "000000.vit.safetensors")
    (tmp_path / "000000.vit.safetensors").rename(tmp_path / "000000.vit.safetensors.4711.partial")
    with pytest.raises(DataError, match="are missing"):
        open_group(tmp_path)
    write(tmp_path / "000000.vit.safetensors")
    assert open_group(tmp_path).teachers


def test_shards_that_would_share_a_store_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "000000.vit.safetensors")
    with pytest.raises(DataError, match="would share one store"):
        open_stores(["/x/000000.tar", "/y/000000.tar"], ["vit"], str(tmp_path), "error")
    assert open_stores(["/x/000000.tar", "/x/000000.tar"], ["vit"], str(tmp_path), "error").teachers


def test_stores_stay_open_while_shards_are_mixed_and_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Counted(Store):
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    shards = [f"{tmp_path}/{index:06d}.tar" for index in range(OPEN_SHARDS + 1)]
    for index in range(len(shards)):
        write(tmp_path / f"{index:06d}.vit.safetensors")
    stores = open_group(tmp_path, shards=len(shards))
    monkeypatch.setattr("jettclip.data.store_group.Store", Counted)
    for _ in range(3):
        for shard in shards[:-1]:
            stores.lookup(group(shard, "a"), contents("a"), first)
    assert len(opened) == OPEN_SHARDS
    stores.lookup(group(shards[-1], "a"), contents("a"), first)
    stores.lookup(group(shards[1], "a"), contents("a"), first)
    assert len(opened) == OPEN_SHARDS + 1
    stores.lookup(group(shards[0], "a"), contents("a"), first)
    assert len(opened) == OPEN_SHARDS + 2


def test_stores_that_are_closed_or_refused_give_their_files_back(tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(str(tmp_path) in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())

    shards = 2 * OPEN_SHARDS
    for index in range(shards):
        write(tmp_path / f"{index:06d}.vit.safetensors", **({"weights_digest": "34cd"} if index % 4 == 1 else {}))
        if index % 4 == 3:
            _old_format(tmp_path, f"{index:06d}.vit.safetensors")
    stores = open_group(tmp_path, on_missing="drop", shards=shards)
    for index in range(shards):
        sample = group(f"{tmp_path}/{index:06d}.tar", "a")
        if index % 2:
            with pytest.raises(Dropped, match="of another teacher|cannot be read"):
                stores.lookup(sample, contents("a"), first)
        else:
            stores.lookup(sample, contents("a"), first)
    assert open_files() == OPEN_SHARDS // 2
    del stores
    gc.collect()  # an exception that is kept knows the frames it came through
    assert open_files() == 0
