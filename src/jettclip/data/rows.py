"""A row of a list that is no shard: where its picture is, its captions, and whatever else the list says of it."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jettclip.data.counts import DataError, Dropped
from jettclip.data.decode import decode_text
from jettclip.data.tar import MAX_MEMBER_BYTES

VIEW_KEYS = ("short_caption", "long_caption")
"""The names that the captions of the views have in the json member."""


class Row(NamedTuple):
    """A picture and its captions, as a table, a JSON file or a folder lists them."""

    key: str  # "000000012" for tables and JSON, the relative path without suffix for folders
    image: str  # path
    captions: dict[str, list[str]]  # by view, "short" or "long"; a view without captions is left out
    extra: dict[str, Any]  # all columns, for the json member
    where: str  # "pairs.csv, row 12", for messages


class Lost(NamedTuple):
    """An input that makes no sample."""

    reason: str  # a short fixed phrase, by which it is counted
    where: str


class Place(NamedTuple):
    """Where in a list a row stands; its key is the number."""

    path: str
    number: int  # from 0

    def __str__(self) -> str:
        return f"{os.path.basename(self.path)}, row {self.number}"


def make_row(
    place: Place, image: object, root: str, captions: Mapping[str, Sequence[object]], extra: Mapping[str, Any]
) -> Row | Lost:
    """Makes a row of what a list says; one without a picture or without any caption is lost.

    Args:
        place: of the row.
        image: the picture's path, absolute or below `root`, with slashes or backslashes.
        root: folder of the pictures.
        captions: by view; what is no text or blank is left out.
        extra: all that the list says of the row.
    """
    if not isinstance(image, str) or not image.strip():
        return Lost("no image in the row", str(place))
    texts = {view: [text.strip() for text in found if isinstance(text, str)] for view, found in captions.items()}
    kept = {view: [text for text in found if text] for view, found in texts.items()}
    kept = {view: found for view, found in kept.items() if found}
    if not kept:
        return Lost("empty caption", str(place))
    if not all(map(is_utf8, [image, *(text for found in kept.values() for text in found)])):
        return Lost("row is not UTF-8", str(place))
    try:
        check_captions(kept)
    except Dropped as error:
        return Lost(error.reason, str(place))
    path = os.path.join(root, image.strip().replace("\\", "/"))
    return Row(
        f"{place.number:09d}", path, kept, {str(name): _plain(value) for name, value in extra.items()}, str(place)
    )


def check_captions(captions: Mapping[str, Sequence[str]]) -> None:
    """Raises Dropped if a caption is one that `decode_text` would not take from a shard."""
    for texts in captions.values():
        for text in texts:
            decode_text(text.encode())


def describe_row(row: Row, **own: Any) -> dict[str, Any]:
    """Returns what the json member says of a row: all columns, its captions by view as text or list, and `own` values.

    A column that has the name of one of these is kept as ``<name>_column``, unless it is blank or says the same. So a
    view without captions is in the json under no name that a caption is looked for.
    """
    captions = {f"{view}_caption": texts if len(texts) > 1 else texts[0] for view, texts in row.captions.items()}
    own = captions | own
    described = {}
    for name, value in row.extra.items():
        if name not in own and name not in VIEW_KEYS:
            described[name] = value
        elif _as_text(value) not in ("", _as_text(own.get(name))):
            described[_free_name(name, {**row.extra, **described, **own})] = value
    return described | own


def _as_text(value: Any) -> str:
    return "" if value is None or value == [] else str(value).strip()


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name += "_column"
    return name


def is_utf8(text: str) -> bool:
    """Tells whether a text can be written as UTF-8: one read with ``surrogateescape``, or from JSON, may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_file(path: str) -> None:
    """Raises DataError if a file cannot be opened."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{path!r} cannot be opened: {error.strerror}; give a file that can be read") from error


def read_picture(path: str) -> bytes:
    """Returns the bytes of a picture's file.

    Raises:
        Dropped: if it is not there, no regular file, larger than a member of a tar may be, or cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep a reader waiting
            raise Dropped("image is not a regular file")
        if status.st_size > MAX_MEMBER_BYTES:
            raise Dropped(f"image is larger than {MAX_MEMBER_BYTES >> 20} MiB")
        with open(path, "rb") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Dropped("missing file", path) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Dropped("file cannot be read", str(error)) from error


def numbered(path: str, rows: Iterator[Any]) -> Iterator[tuple[Place, Any]]:
    """Yields rows with their places in the file."""
    return ((Place(path, number), row) for number, row in enumerate(rows))


def _plain(value: Any) -> Any:
    """Returns the value as strict JSON can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
