from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jettclip.data.counts import DataError
from jettclip.data.rows import Lost, Place, Row, check_file, describe_row, make_row

PLACE = Place("lists/pairs.csv", 12)


def made(**changes: Any) -> Row | Lost:
    given: dict[str, Any] = {"image": "a/b.jpg", "root": "pictures", "captions": {"long": ["A tree."]}, "extra": {}}
    return make_row(PLACE, **given | changes)


def test_a_row_has_its_number_as_key_and_says_where_it_stands() -> None:
    assert made(extra={"id": 3}) == Row(
        "000000012", "pictures/a/b.jpg", {"long": ["A tree."]}, {"id": 3}, "pairs.csv, row 12"
    )


@pytest.mark.parametrize(
    ("image", "path"), [("/data/a.jpg", "/data/a.jpg"), ("a\\b.jpg", "pictures/a/b.jpg"), (" a.jpg ", "pictures/a.jpg")]
)
def test_relative_paths_are_below_the_root_with_either_slash(image: str, path: str) -> None:
    row = made(image=image)
    assert isinstance(row, Row)
    assert row.image == path


def test_blank_captions_and_views_without_any_are_left_out() -> None:
    row = made(captions={"long": [" A tree.\n", " ", None, 3, "Two trees."], "short": [""]})
    assert isinstance(row, Row)
    assert row.captions == {"long": ["A tree.", "Two trees."]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": None}, "no image in the row"),
        ({"image": " "}, "no image in the row"),
        ({"captions": {"long": [" "], "short": []}}, "empty caption"),
        ({"captions": {"long": ["caf\udce9"]}}, "row is not UTF-8"),
        ({"image": "caf\udce9.jpg"}, "row is not UTF-8"),
        ({"captions": {"long": ["A tree."], "short": ["x" * 150_000]}}, "caption is absurdly long"),
    ],
)
def test_what_makes_no_sample_is_lost_by_reason(changes: dict[str, Any], reason: str) -> None:
    assert made(**changes) == Lost(reason, "pairs.csv, row 12")


def test_columns_are_what_strict_json_can_hold() -> None:
    row = made(extra={"score": math.nan, "most": math.inf, "share": 0.5})
    assert isinstance(row, Row)
    assert json.dumps(row.extra, allow_nan=False) == '{"score": null, "most": null, "share": 0.5}'


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.*gone.csv' cannot be opened: No such file or directory; give a file"):
        check_file(str(tmp_path / "gone.csv"))
    with pytest.raises(DataError, match="cannot be opened: Is a directory"):
        check_file(str(tmp_path))


def test_the_json_says_captions_and_columns_and_loses_none_to_a_name() -> None:
    extra = {"id": 3, "short_caption": " ", "long_caption": "another", "width": "640", "height": 5, "width_column": "w"}
    row = made(extra=extra, captions={"long": ["A tree.", "Trees."], "short": [" "]})
    assert isinstance(row, Row)
    assert describe_row(row, width=224, height=5) == {
        "id": 3, "long_caption_column": "another", "width_column_column": "640", "width_column": "w",
        "long_caption": ["A tree.", "Trees."], "width": 224, "height": 5,
    }  # fmt: skip


def test_a_column_that_says_what_a_caption_says_is_not_kept_twice() -> None:
    row = made(extra={"short_caption": "tree ", "long_caption": ["A tree."]}, captions={"short": ["tree"]})
    assert isinstance(row, Row)
    assert describe_row(row) == {"short_caption": "tree", "long_caption_column": ["A tree."]}
