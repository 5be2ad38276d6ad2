from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from jettclip.data.conversations import read_conversations
from jettclip.data.counts import DataError
from jettclip.data.rows import Lost, Row


def item(number: int, **changes: Any) -> dict[str, Any]:
    answer = {"from": "gpt", "value": f"The picture {number} shows a tree."}
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, answer, {"from": "gpt", "value": "Later."}]
    return {"id": f"id{number}", "image": f"coco/{number}.jpg", "conversations": turns} | changes


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("lines", [False, True])
def test_a_list_and_lines_give_the_same_rows(lines: bool, bom: bytes, tmp_path: Path) -> None:
    items = [item(0), item(1, score=0.5)]
    text = "\n\n".join(map(json.dumps, items)) if lines else " \n" + json.dumps(items, indent=1)
    (tmp_path / "a.json").write_bytes(bom + text.encode())
    assert list(read_conversations(tmp_path / "a.json", "/data")) == [
        Row(
            f"00000000{number}",
            f"/data/coco/{number}.jpg",
            {"long": [f"The picture {number} shows a tree."]},
            {"id": f"id{number}", "image": f"coco/{number}.jpg"} | ({"score": 0.5} if number else {}),
            f"a.json, row {number}",
        )
        for number in range(2)
    ]


def test_pictures_lie_beside_the_file_by_default(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([item(0)]))
    (row,) = read_conversations(tmp_path / "a.json")
    assert isinstance(row, Row)
    assert row.image == str(tmp_path / "coco/0.jpg")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (item(0, image=None), "no image in the row"),
        ({"id": 1, "conversations": item(0)["conversations"]}, "no image in the row"),  # text only
        (item(0, conversations=[]), "empty caption"),
        (item(0, conversations="x"), "empty caption"),
        (item(0, conversations=[{"from": "human", "value": "What?"}]), "empty caption"),
        (item(0, conversations=[{"from": "gpt", "value": " "}]), "empty caption"),
        ([1], "row is not an object"),
    ],
)
def test_rows_without_picture_or_caption_are_lost(entry: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([entry, item(1)]))
    lost, row = read_conversations(tmp_path / "a.json")
    assert lost == Lost(reason, "a.json, row 0")
    assert isinstance(row, Row)


def test_a_damaged_line_is_lost_and_those_after_it_are_read(tmp_path: Path) -> None:
    lines = [json.dumps(item(0)).encode(), b'{"image": "a', b"\xff\xfe", json.dumps(item(3)).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    first, *lost, last = read_conversations(tmp_path / "a.jsonl")
    assert isinstance(first, Row)
    assert lost == [Lost("row is not JSON", f"a.jsonl, row {number}") for number in (1, 2)]
    assert isinstance(last, Row)
    assert last.key == "000000003"


def test_a_list_that_breaks_off_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([item(number) for number in range(3)])[:-200])
    with pytest.raises(DataError, match=r"a.json breaks off as JSON at row 2: .*; fetch or write it again"):
        list(read_conversations(tmp_path / "a.json"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (2000, 16000):
        (tmp_path / "a.json").write_text(json.dumps([item(number) for number in range(count)]))
        tracemalloc.start()
        assert sum(1 for _ in read_conversations(tmp_path / "a.json")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 10_000


def test_captions_may_be_lists(tmp_path: Path) -> None:
    entry = {"image": "a.jpg", "long_caption": ["One.", "Two."], "short_caption": ["1", ""]}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    (row,) = read_conversations(tmp_path / "a.jsonl")
    assert isinstance(row, Row)
    assert row.captions == {"long": ["One.", "Two."], "short": ["1"]}
