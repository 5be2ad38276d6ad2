"""Reads a folder in which a picture and a text file share a stem, at any depth."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator

from jettclip.data.counts import DataError, Dropped
from jettclip.data.rows import Lost, Row, check_captions, is_utf8

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of pictures that can be decoded, in any case; of two of one stem in a folder, the first here is kept."""

TEXT = ".txt"
MAX_TEXT_BYTES = 2**24
_NOT_IN_KEYS = re.compile(r"[.\x00-\x1f\x7f]")
_LINE_END = re.compile(r"\r\n|\r|\n")  # not what str.splitlines also takes for one, such as U+2028


STRAY = "not a picture or text"
"""What a file of a folder is that no sample could be made of."""


def read_folder(
    root: str | os.PathLike[str], caption_pattern: str | None = None, skip: str = ""
) -> Iterator[Row | Lost]:
    """Yields the pairs below a folder, sorted by path, and after them every file that is in none.

    A picture belongs to the text beside it. One that has none belongs to the only text of its stem anywhere below the
    root, if it is also the only such picture and the text has no picture beside it. The captions, all of the view
    "long", are the lines of the text that are not blank.

    Args:
        root: the folder; links to folders are not followed.
        caption_pattern: a regular expression; only lines in which it is found are captions, and of them its first
            group, if it has one.
        skip: a folder that is not looked into, if it lies below the root: that of the output.

    Raises:
        ValueError: if there is no such folder, or the pattern is no regular expression.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise DataError(f"{root!r} is no folder; give one that is there")
    try:
        pattern = re.compile(caption_pattern) if caption_pattern else None
    except re.error as error:
        raise ValueError(f"--caption-pattern {caption_pattern!r} is no regular expression: {error}") from error
    index = sqlite3.connect("")  # a file that SQLite deletes when it is closed: memory does not grow with the folder
    try:
        index.create_function("key_of", 1, _key, deterministic=True)
        index.executescript(_TABLES)
        index.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?)", _files(root, skip))
        index.executescript(_PAIRING)
        for picture, text, key, again in index.execute(_PAIRS):
            yield Lost("duplicate key", picture) if again else _read(root, picture, text, key, pattern)
        yield from (Lost(reason, path) for path, reason in index.execute(_UNPAIRED))
    except sqlite3.Error as error:
        raise DataError(f"the index of {root} cannot be kept in a temporary file: {error}") from error
    finally:
        index.close()


_TABLES = """
CREATE TABLE files (path TEXT, folder TEXT, stem TEXT, rank TEXT, kind TEXT);  -- picture, text, or why it is neither
"""

_PAIRING = """
CREATE INDEX files_by_stem ON files (stem, kind, folder, rank);

CREATE TABLE firsts AS  -- a picture and a text of every folder and stem
    SELECT path, folder, stem, kind, min(rank) FROM files WHERE kind IN ('picture', 'text') GROUP BY stem, kind, folder;
CREATE INDEX firsts_by_stem ON firsts (stem, folder, kind);

CREATE TABLE pairs AS  -- side by side
    SELECT p.path AS picture, t.path AS text, key_of(p.path) AS key FROM firsts p JOIN firsts t USING (stem, folder)
    WHERE p.kind = 'picture' AND t.kind = 'text';

CREATE TABLE singles AS  -- without a partner in their folder
    SELECT path, stem, kind FROM firsts GROUP BY stem, folder HAVING count(*) = 1;
CREATE INDEX singles_by_stem ON singles (stem, kind);

INSERT INTO pairs  -- in two folders
    SELECT p.path, t.path, key_of(p.path) FROM singles p JOIN singles t USING (stem)
    WHERE p.kind = 'picture' AND t.kind = 'text'
    AND (SELECT count(*) FROM files WHERE stem = t.stem AND kind = 'text') = 1
    AND (SELECT count(*) FROM singles WHERE stem = p.stem AND kind = 'picture') = 1;

CREATE INDEX pairs_by_key ON pairs (key, picture);
CREATE TABLE paired (path TEXT PRIMARY KEY);
INSERT INTO paired SELECT picture FROM pairs UNION ALL SELECT text FROM pairs;
"""

_PAIRS = """
SELECT picture, text, key, EXISTS (SELECT 1 FROM pairs o WHERE o.key = pairs.key AND o.picture < pairs.picture)
FROM pairs ORDER BY picture
"""

_UNPAIRED = """
SELECT path, CASE
    WHEN kind NOT IN ('picture', 'text') THEN kind
    WHEN EXISTS (SELECT 1 FROM files o WHERE o.stem = files.stem AND o.kind IN ('picture', 'text')
        AND o.kind <> files.kind) THEN 'duplicate stem'
    WHEN kind = 'picture' THEN 'no text file'
    ELSE 'no picture for the text' END
FROM files WHERE path NOT IN paired ORDER BY path
"""


def _files(root: str, skip: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yields every file below a folder as a row of the table `files`; its path is relative."""
    waiting, skipped = [""], os.path.relpath(os.path.realpath(skip), os.path.realpath(root)) if skip else None
    while waiting:
        folder = waiting.pop()
        try:
            entries = os.scandir(os.path.join(root, folder))
        except OSError:
            yield _readable(folder), "", "", "", "folder cannot be read"
            continue
        with entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    if path != skipped:
                        waiting.append(path)
                    continue
                if not is_utf8(path):
                    yield _readable(path), "", "", "", "file name is not UTF-8"
                    continue
                stem, suffix = os.path.splitext(entry.name)
                kind = _kind(entry, suffix.lower())
                rank = PICTURES.index(suffix.lower()) if kind == "picture" else 0
                yield path, folder, stem, f"{rank:02d}{path}", kind


def _kind(entry: os.DirEntry[str], suffix: str) -> str:
    if entry.is_dir():
        return "link to a folder is not followed"
    if suffix not in (*PICTURES, TEXT):
        return STRAY
    if not entry.is_file():
        return "not a regular file"
    return "text" if suffix == TEXT else "picture"


def _readable(path: str) -> str:
    """Returns a path with what is not UTF-8 in it written out, since SQLite stores none of it."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _key(picture: str) -> str:
    return _NOT_IN_KEYS.sub("_", os.path.splitext(picture)[0])


def _read(root: str, picture: str, text: str, key: str, pattern: re.Pattern[str] | None) -> Row | Lost:
    """Makes a row of a picture and its text."""
    try:
        with open(os.path.join(root, text), "rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            return Lost(f"text is larger than {MAX_TEXT_BYTES >> 20} MiB", text)
        lines = _LINE_END.split(data.decode("utf-8-sig"))
    except OSError:
        return Lost("text file cannot be read", text)
    except UnicodeDecodeError:
        return Lost("caption is not UTF-8", text)
    captions = [caption for line in lines if (caption := _caption(line, pattern))]
    if not captions:
        return Lost("empty caption", text)
    try:
        check_captions({"long": captions})
    except Dropped as error:
        return Lost(error.reason, text)
    path = os.path.join(root, picture)
    return Row(key, path, {"long": captions}, {"image": picture, "text": text}, picture)


def _caption(line: str, pattern: re.Pattern[str] | None) -> str:
    """Returns what of a line is a caption; nothing where the pattern is not found."""
    match = pattern.search(line) if pattern else None
    if match and match.re.groups:
        line = match.group(1) or ""
    return line.strip() if match or not pattern else ""
