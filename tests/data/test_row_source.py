from __future__ import annotations

import csv
import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from jettclip.data import rows as rows_module
from jettclip.data.counts import DataError, Tally
from jettclip.data.loader import Loader
from jettclip.data.pipeline import get_wds_dataset
from jettclip.data.plan import stretch
from jettclip.data.row_source import RowShards, RowSource, SyntheticSource, open_rows
from jettclip.data.rows import Lost, Row
from jettclip.data.shards import Shard
from jettclip.settings import DataSettings
from support import caption, picture, write_shard

WANTED = frozenset({"jpg", "json"})


def write_table(path: Path, rows: list[dict[str, str]], separator: str = ",") -> str:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    return names


def pairs(folder: Path, count: int, image: str = "filepath", text: str = "title", separator: str = "\t") -> str:
    names = write_pictures(folder, count)
    rows = [{image: name, text: caption(number), "source": "web"} for number, name in enumerate(names)]
    return write_table(folder / "pairs.csv", rows, separator)


def groups(source: Any) -> list[dict[str, Any]]:
    tally = Tally()
    return [group for shard in source.shards for group in source.read(shard, WANTED, tally, 0, 1)]


def long_captions(source: Any) -> list[str]:
    return [json.loads(group["json"])["long_caption"] for group in groups(source)]


def to_tensor(image: Image.Image) -> Tensor:
    return pil_to_tensor(image.resize((8, 8)))


def tokenize(text: str) -> Tensor:
    return torch.tensor([list(text.encode()[:40].ljust(40))])


def load(source: Any, batch_size: int = 4, is_train: bool = False, **arguments: Any) -> Loader:
    settings = DataSettings(**arguments.pop("settings", {}))
    return get_wds_dataset(
        settings, source, to_tensor, tokenizer=tokenize, is_train=is_train, batch_size=batch_size, **arguments
    )


def test_a_row_of_a_table_becomes_a_group_of_members(tmp_path: Path) -> None:
    table = pairs(tmp_path, 2)
    source = open_rows("csv", table)
    assert [*source.shards] == [Shard(table, 1, 1.0, 0), Shard(table, 1, 1.0, 1)]
    assert source.lost == {}
    found = groups(source)[1]
    columns = {"filepath": "1.png", "title": caption(1), "source": "web", "long_caption": caption(1)}
    assert json.loads(found.pop("json")) == columns
    assert found == {
        "__key__": "000000001", "__shard__": table, "__image__": str(tmp_path / "1.png"), "jpg": picture(1),
    }  # fmt: skip


@pytest.mark.parametrize("separator", ["\t", "\\t", ","])
@pytest.mark.parametrize(("image", "text"), [("filepath", "title"), ("image_path", "text")])
def test_openclips_columns_are_found_and_so_are_other_usual_ones(
    tmp_path: Path, separator: str, image: str, text: str
) -> None:
    table = pairs(tmp_path, 2, image, text, separator.replace("\\t", "\t"))
    assert long_captions(open_rows("csv", table)) == [caption(0), caption(1)]  # whatever the separator, unless told
    assert long_captions(open_rows("csv", table, separator=separator)) == [caption(0), caption(1)]


def test_openclips_columns_come_before_others(tmp_path: Path) -> None:
    row = {"text": "a text", "image_path": "no.png", "title": "a title", "filepath": "0.png"}
    (tmp_path / "0.png").write_bytes(picture(0))
    table = write_table(tmp_path / "pairs.csv", [row])
    assert long_captions(open_rows("csv", table)) == ["a title"]
    assert groups(open_rows("csv", table))[0]["jpg"] == picture(0)
    assert long_captions(open_rows("csv", table, caption_column="text")) == ["a text"]
    assert "jpg" not in groups(open_rows("csv", table, image_column="image_path"))[0]


def test_a_table_may_have_short_captions_and_any_separator(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    row = {"filepath": "0.png", "title": "A dog, brown", "short_caption": "dog"}
    batch = next(iter(load(open_rows("csv", write_table(tmp_path / "a.txt", [row], ";"), separator=";"), 1)))
    assert torch.equal(batch.short_caption, tokenize("dog"))
    assert torch.equal(batch.long_caption, tokenize("A dog, brown"))


def test_any_column_may_be_the_caption_field(tmp_path: Path) -> None:
    settings = {"long_caption_field": "json:source"}
    batch = next(iter(load(open_rows("csv", pairs(tmp_path, 1)), 1, settings=settings)))
    assert torch.equal(batch.long_caption, tokenize("web"))


def test_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 1)
    table = write_table(tmp_path / "pairs.csv", [{"filepath": "0.png", "title": "a dog"}])
    assert groups(open_rows("csv", table, image_root=str(tmp_path / "pictures")))[0]["jpg"] == picture(0)


def test_a_folder_gives_the_captions_of_each_picture(tmp_path: Path) -> None:
    write_pictures(tmp_path / "some", 2)
    (tmp_path / "some" / "0.txt").write_text("a dog\na brown dog\n", "utf-8")
    (tmp_path / "some" / "1.txt").write_text("一只猫", "utf-8")
    source = open_rows("folder", str(tmp_path))
    assert [group["__key__"] for group in groups(source)] == ["some/0", "some/1"]
    assert long_captions(source) == [["a dog", "a brown dog"], "一只猫"]
    loader, seen = load(source, 2, is_train=True, views=("long",)), set()
    for epoch in range(10):
        loader.set_epoch(epoch)
        seen |= {bytes(row.tolist()).decode().strip() for batch in loader for row in batch.long_caption}
    assert seen == {"a dog", "a brown dog", "一只猫"}


def test_a_list_of_conversations_gives_the_answers(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": 7, "image": "0.png", "conversations": turns}]), "utf-8")
    source = open_rows("json", str(tmp_path / "a.json"))
    assert long_captions(source) == ["A dog."]
    assert groups(source)[0]["jpg"] == picture(0)


def test_rows_give_the_same_batches_as_shards(tmp_path: Path) -> None:
    table = pairs(tmp_path, 10)
    samples = [{"__key__": f"{n:09d}", "png": picture(n), "long_caption": caption(n)} for n in range(10)]
    shard = write_shard(tmp_path / "0.tar", samples)
    for arguments in ({}, {"rank": 1, "world_size": 2, "workers": 2}):
        ours, theirs = load(open_rows("csv", table), **arguments), load(shard, **arguments)
        for batch, expected in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch[:3], expected[:3], strict=True))
            assert ours.last_info == theirs.last_info


def test_a_pass_in_training_sees_every_row_once_in_another_order(tmp_path: Path) -> None:
    source = open_rows("csv", pairs(tmp_path, 24))
    orders = []
    for epoch in range(2):
        keys: list[str] = []
        for rank in range(2):
            loader = load(source, 3, True, rank=rank, world_size=2, workers=2, settings={"shuffle_buffer": 1})
            loader.set_epoch(epoch)
            for _ in loader:
                keys += loader.last_info.keys
        assert sorted(keys) == [f"{row:09d}" for row in range(24)]
        orders.append(keys)
    assert orders[0] != orders[1]
    assert sorted(orders[0][:3]) != orders[0][:3] or sorted(orders[0][3:6]) != orders[0][3:6]


def test_a_picture_that_cannot_be_read_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.png").write_bytes(picture(0))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "large.png").write_bytes(bytes(5000))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    names = ["good.png", "missing.png", "bad.png", "folder.png", "good.png\0.png", "large.png", "pipe.png"]
    rows = [Row(f"{i}", str(tmp_path / name), {"long": ["a dog"]}, {}, "") for i, name in enumerate(names)]
    monkeypatch.setattr(rows_module, "MAX_MEMBER_BYTES", 4000)
    loader = load(RowSource("rows", rows), 7)
    assert [len(batch.image) for batch in loader] == [1]
    assert loader.last_info.keys == ["0"]
    assert loader.last_info.dropped == {"image is missing": 5, "image cannot be decoded": 1}


def row(number: int) -> Row:
    return Row(f"{number:09d}", "no.png", {"long": ["a dog"]}, {}, f"row {number}")


def test_inputs_that_make_no_sample_are_counted_by_reason(caplog: pytest.LogCaptureFixture) -> None:
    inputs = [row(0), Lost("empty caption", "row 1"), row(2), Lost("empty caption", "row 3"), Lost("no image", "row 4")]
    source = RowSource("a list", inputs)
    assert source.lost == {"empty caption": 2, "no image": 1}
    assert [group["__key__"] for group in groups(source)] == ["000000000", "000000002"]
    assert [record.message for record in caplog.records] == [
        "a list: lost row 1: empty caption (further ones are only counted)",
        "a list: lost row 4: no image (further ones are only counted)",
    ]


def test_too_many_lost_inputs_are_an_error() -> None:
    inputs = [*map(row, range(9)), Lost("empty caption", "row 9")]
    assert len(RowSource("a list", inputs, max_drop_rate=0.1).shards) == 9
    with pytest.raises(DataError, match="1 of 10 samples .* .empty caption 1., more than --max-drop-rate 0.09"):
        RowSource("a list", inputs, max_drop_rate=0.09)


@pytest.mark.parametrize("inputs", [[], [Lost("empty caption", "row 0")]])
def test_no_row_at_all_is_an_error(inputs: list[Lost]) -> None:
    with pytest.raises(DataError, match="'a list' has no row that makes a sample; lost: (none|empty caption 1)"):
        RowSource("a list", inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("csv", "no.csv"), "'no.csv' does not exist; give the csv to train on"),
        (("folder", "no"), "'no' does not exist; give the folder"),
        (("synthetic", ""), "--dataset-type synthetic has no end; say with --train-num-samples"),
    ],
)
def test_what_is_not_there_is_an_error(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_rows(*arguments)


def test_columns_and_separators_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    table = pairs(tmp_path, 1)
    for columns in ({"image_column": "image"}, {"caption_column": "text"}):
        with pytest.raises(ValueError, match="has no column '(image|text)', but filepath, title, source"):
            open_rows("csv", table, **columns)
    with pytest.raises(DataError, match="--csv-separator ', ' must be one character"):
        open_rows("csv", table, separator=", ")


@pytest.mark.parametrize("name", [".", "pairs.csv"])
def test_what_cannot_be_opened_as_a_table_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs(tmp_path, 1)
    if name != ".":  # tests may run as root, who may read everything
        monkeypatch.setattr("builtins.open", _refuse)
    for kind in ("csv", "json"):
        with pytest.raises(DataError, match="cannot be opened: (Is a directory|Permission denied); give a file"):
            open_rows(kind, str(tmp_path / name))


def _refuse(path: str, *_: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def test_openclips_columns_are_found_in_parquet_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": ["a text"], "title": ["a title"], "filepath": ["0.png"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.pq")
    assert long_captions(open_rows("csv", str(tmp_path / "a.pq"))) == ["a title"]
    assert long_captions(open_rows("csv", str(tmp_path / "a.pq"), caption_column="text")) == ["a text"]
    with pytest.raises(DataError, match="has no column 'alt', but text, title, filepath"):
        open_rows("csv", str(tmp_path / "a.pq"), caption_column="alt")


def test_of_a_folder_of_shards_it_is_said_how_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row that makes a sample; lost: none$"):
        open_rows("folder", str(tmp_path))
    write_shard(tmp_path / "0.tar", [])
    with pytest.raises(DataError, match=r"shards are named one by one, such as '.*/\{000000\.\.000099\}\.tar'"):
        open_rows("folder", str(tmp_path))


def test_synthetic_samples_are_alike_but_for_their_keys() -> None:
    source = open_rows("synthetic", "", num_samples=6)
    found = groups(source)
    assert [group.pop("__key__") for group in found] == [f"{number:09d}" for number in range(6)]
    assert all(group == found[0] for group in found)
    loader = load(SyntheticSource(6), 3, is_train=True, workers=1, settings={"short_caption_policy": "none"})
    batches = [*loader]
    assert [batch.image.shape for batch in batches] == [(3, 3, 8, 8)] * 2
    assert torch.equal(batches[0].image, batches[1].image)
    assert not loader.last_info.dropped


def test_a_source_is_the_same_in_a_process_that_gets_it_by_pickle(tmp_path: Path) -> None:
    source = open_rows("csv", pairs(tmp_path, 3))
    assert groups(pickle.loads(pickle.dumps(source))) == groups(source)


def test_shards_of_rows_are_a_sequence_that_the_plan_can_read() -> None:
    shards = RowShards("list", 5)
    whole = [Shard("list", 1, 1.0, row) for row in range(5)]
    assert [*shards] == whole
    assert shards[1:3] == whole[1:3]
    assert shards[-1] == whole[-1]
    with pytest.raises(IndexError):
        shards[5]
    assert [*stretch(shards, 0, 10, 0)] == [*stretch(whole, 0, 10, 0)]
    assert sorted(shard.row for shard, _, _ in stretch(shards, 5, 10, 0)) == [0, 1, 2, 3, 4]
