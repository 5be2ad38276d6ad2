from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jettclip.data.counts import DataError, Dropped
from jettclip.data.features import PARTS, Store, digest, write_store
from jettclip.data.store_group import OPEN_SHARDS, StoreGroup, open_stores
from jettclip.types import TeacherInfo
from stores import KEYS, WIDTH, content, contents, features, info, write


def group(folder: Path, names: Sequence[str] = ("vit",), on_missing: str = "error", shards: int = 1) -> StoreGroup:
    return open_stores([f"{folder}/{index:06d}.tar" for index in range(shards)], names, "", on_missing)


def test_rows_are_joined_by_key_and_not_by_position(tmp_path: Path) -> None:
    rows = features()
    order = [2, 0, 1]
    write(tmp_path / "000000.vit.safetensors", rows)
    write(tmp_path / "000001.vit.safetensors", {p: r[order] for p, r in rows.items()}, [KEYS[i] for i in order])
    stores = group(tmp_path, shards=2)
    for key in KEYS:
        first, second = (stores.lookup(f"{tmp_path}/{s:06d}.tar", key, contents(key)) for s in (0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)
        assert torch.equal(first.long if first.long is not None else torch.empty(0), rows["long"][KEYS.index(key)])


def test_several_teachers_stand_side_by_side(tmp_path: Path) -> None:
    small = write(tmp_path / "000000.vit.safetensors")
    large = write(tmp_path / "000000.big.safetensors", features(6, seed=1), width=6, model="Big", logit_scale=50.0)
    stores = group(tmp_path, ["vit", "big"])
    found = stores.lookup(f"{tmp_path}/000000.tar", "b", contents("b"))
    assert found.image is not None
    assert torch.equal(found.image, torch.cat([small["image"][1], large["image"][1]]))
    assert stores.teachers == [TeacherInfo("vit", WIDTH, 100 / 3), TeacherInfo("big", 6, 50.0)]


def test_only_the_parts_that_are_asked_for_are_read(tmp_path: Path) -> None:
    rows = features()
    write(tmp_path / "000000.vit.safetensors", {"long": rows["long"]})
    found = group(tmp_path).lookup(f"{tmp_path}/000000.tar", "a", {"long": content("long", "a")})
    assert found.image is None
    assert found.short is None
    assert found.long is not None


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


def _fewer_rows_than_keys(folder: Path) -> None:
    path = folder / "000001.vit.safetensors"
    tensors = {name: rows[:2].contiguous() for name, rows in load_file(path).items()}
    metadata = {name: str(value) for name, value in info().__dict__.items()}
    save_file(tensors, path, metadata | {"jettclip_store": "1", "keys": json.dumps(KEYS)})


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
        (_fewer_rows_than_keys, "feature store cannot be read"),
    ],
)
def test_a_bad_row_is_an_error_naming_shard_and_key_or_a_drop_with_its_reason(
    harm: Any, reason: str, tmp_path: Path
) -> None:
    for index in range(2):
        write(tmp_path / f"{index:06d}.vit.safetensors")
    strict = group(tmp_path, shards=2)
    harm(tmp_path)
    lenient = group(tmp_path, shards=2, on_missing="drop")
    shard = f"{tmp_path}/000001.tar"
    for _ in range(2):  # what was found wrong with a shard holds for its next sample
        with pytest.raises(
            DataError,
            match=rf"000001\.tar, sample b: {reason}.*--overwrite.*--on-missing-features drop",
        ):
            strict.lookup(shard, "b", contents("b"))
        with pytest.raises(Dropped) as dropped:
            lenient.lookup(shard, "b", contents("b"))
        assert dropped.value.reason == reason
    assert lenient.lookup(f"{tmp_path}/000000.tar", "b", contents("b")).image is not None


def test_a_missing_store_is_found_before_training(tmp_path: Path) -> None:
    write(tmp_path / "000000.vit.safetensors")
    with pytest.raises(DataError, match=r"1 of 2 stores of 'vit' are missing, the first is .*000001\.vit\.safetensors"):
        group(tmp_path, shards=2)
    with pytest.raises(DataError, match="2 of 2 stores of 'typo' are missing"):
        group(tmp_path, ["typo"], "drop", shards=2)


@pytest.mark.parametrize("harm", [_truncated, _empty, _foreign])
def test_a_first_store_that_cannot_be_read_is_found_before_training(harm: Any, tmp_path: Path) -> None:
    write(tmp_path / "000001.vit.safetensors")
    harm(tmp_path)
    with pytest.raises(DataError, match=r"000001\.vit\.safetensors.*extract it again"):
        open_stores([f"{tmp_path}/000001.tar"], ["vit"], "", "error")


def test_what_a_crash_left_behind_is_not_taken_for_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "000000.vit.safetensors")
    assert list(tmp_path.iterdir())
    with pytest.raises(DataError, match="are missing"):
        group(tmp_path)
    write(tmp_path / "000000.vit.safetensors")
    assert group(tmp_path).teachers


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
    stores = group(tmp_path, shards=len(shards))
    monkeypatch.setattr("jettclip.data.store_group.Store", Counted)
    for _ in range(3):
        for shard in shards[:-1]:
            stores.lookup(shard, "a", contents("a"))
    assert len(opened) == OPEN_SHARDS
    stores.lookup(shards[-1], "a", contents("a"))
    stores.lookup(shards[1], "a", contents("a"))
    assert len(opened) == OPEN_SHARDS + 1
    stores.lookup(shards[0], "a", contents("a"))
    assert len(opened) == OPEN_SHARDS + 2
