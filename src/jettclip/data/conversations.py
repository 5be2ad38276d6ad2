"""Reads captions in the layout of ShareGPT4V (arXiv 2311.12793): a JSON list of conversations about pictures.

    [{"id": ..., "image": "coco/train2017/000000000009.jpg", "conversations": [{"from": "human", "value": "<image>..."},
      {"from": "gpt", "value": "<the caption>"}]}, ...]

The published files are gigabytes of one list, so they are read as a stream. JSON lines of such objects are read too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import IO, Any

from jettclip.data.counts import DataError
from jettclip.data.rows import Lost, Place, Row, check_file, make_row, numbered

SUFFIXES = (".json", ".jsonl", ".ndjson")
"""Of the files that are read so, in any case."""

CAPTION_KEYS = ("long_caption", "caption", "text")
"""Where an object without ``conversations`` may have its caption."""

_UNREADABLE = object()


def read_conversations(path: str | os.PathLike[str], image_root: str | None = None) -> Iterator[Row | Lost]:
    """Yields the rows of a JSON list or of JSON lines; memory does not grow with the file.

    Args:
        path: of the file.
        image_root: folder of the pictures; the file's own by default.

    Raises:
        DataError: if the file cannot be opened, or the list breaks off.
        ValueError: if it is a list and the package ijson is not installed.
    """
    path = os.fspath(path)
    check_file(path)
    root = os.path.dirname(path) if image_root is None else image_root
    for place, item in numbered(path, _items(path)):
        yield _row(place, item, root)


def _row(place: Place, item: Any, root: str) -> Row | Lost:
    if item is _UNREADABLE:
        return Lost("row is not JSON", str(place))
    if not isinstance(item, dict):
        return Lost("row is not an object", str(place))
    extra = {name: value for name, value in item.items() if name != "conversations"}
    captions = {"long": _texts(_caption(item)), "short": _texts(item.get("short_caption"))}
    return make_row(place, item.get("image"), root, captions, extra)


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _caption(item: dict[str, Any]) -> Any:
    """Returns the first answer of the model; of an object without conversations, its caption."""
    turns = item.get("conversations")
    if turns is None:
        return next((item[name] for name in CAPTION_KEYS if name in item), None)
    turns = turns if isinstance(turns, list) else []
    return next((turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"), None)


def _items(path: str) -> Iterator[Any]:
    with open(path, "rb") as stream:
        start = stream.read(3)
        stream.seek(3 if start == b"\xef\xbb\xbf" else 0)  # a byte order mark
        begin = stream.tell()
        first = b" "
        while first.isspace():
            first = stream.read(1)
        stream.seek(begin)
        yield from _list_items(stream, path) if first == b"[" else _line_items(stream)


def _line_items(stream: IO[bytes]) -> Iterator[Any]:
    for line in stream:
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield _UNREADABLE


def _list_items(stream: IO[bytes], path: str) -> Iterator[Any]:
    try:
        import ijson
    except ImportError as error:
        raise ValueError("a JSON list is read with the package ijson; pip install ijson") from error
    number = 0
    try:
        for item in ijson.items(stream, "item", use_float=True):
            yield item
            number += 1
    except ijson.JSONError as error:
        raise DataError(
            f"{path} breaks off as JSON at row {number}: {' '.join(str(error).split())}; fetch or write it again"
        ) from error
