"""Reads lists of pictures and captions from CSV, TSV and Parquet files."""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jettclip.data.counts import DataError
from jettclip.data.rows import Lost, Place, Row, check_file, is_utf8, make_row

PARQUET_SUFFIXES = (".parquet", ".pq")
SUFFIXES = (".csv", ".tsv", *PARQUET_SUFFIXES)
"""Of the files that are read so, in any case."""

IMAGE_COLUMNS = ("filepath", "image_path", "image", "file_name", "filename")
"""Columns that may hold the picture's path; the first that exists is taken, whatever its case; OpenCLIP's first."""

CAPTION_COLUMNS = {"long": ("long_caption", "title", "text", "caption"), "short": ("short_caption",)}
"""Columns that may hold the caption of a view, likewise."""

SEVERAL_CAPTIONS = {
    "short": ("raw_caption", "shortIB_captions", "shortSV_captions", "shortLLA_captions"),
    "long": ("longIB_captions", "longSV_captions", "longLLA_captions"),
}
"""Columns of DreamLIP's lists (arXiv 2403.17007); all that exist are taken if any of the long ones does."""

MAX_HEADER_CHARACTERS = 2**24
_BATCH = 256  # rows of a Parquet file held at a time
_MAX_QUOTED = 80  # characters of what is no table, and as many columns of what is one


class Columns(NamedTuple):
    """The columns of a table that make a row."""

    image: str
    captions: dict[str, list[str]]  # by view


def read_table(
    path: str | os.PathLike[str],
    image_root: str | None = None,
    image_column: str | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    separator: str | None = None,
) -> Iterator[Row | Lost]:
    """Yields the rows of a CSV, TSV or Parquet file; memory does not grow with the file.

    Args:
        path: of the table; ``.parquet`` and ``.pq`` are Parquet, everything else is text, UTF-8 with or without BOM.
        image_root: folder of the pictures; the table's own by default.
        image_column: with the picture's path; found by name by default.
        captions: columns of each view, ``{"long": ["text"], "short": []}``; those of a view without any are found by
            name.
        separator: of a text table; by default a tab if the first line has one, a comma otherwise.

    Raises:
        ValueError: if the file cannot be opened or lacks a column, or if it is Parquet and pyarrow is not installed.
    """
    path = os.fspath(path)
    check_file(path)
    root = os.path.dirname(path) if image_root is None else image_root
    parquet = path.lower().endswith(PARQUET_SUFFIXES)
    rows = _parquet_rows(path) if parquet else _text_rows(path, separator)
    header = next(rows)
    columns = find_columns(list(header), path, image_column, captions)
    for number, values in enumerate(rows):
        place = Place(path, number)
        yield Lost(values, str(place)) if isinstance(values, str) else _row(place, values, root, columns)


def find_columns(
    names: Sequence[str], table: str, image: str | None, captions: Mapping[str, Sequence[str]] | None
) -> Columns:
    """Finds the columns with the picture's path and with the captions of each view.

    Raises:
        ValueError: if one that is asked for, or every one that would do, is missing.
    """
    again = [name for index, name in enumerate(names) if name in names[:index]]
    if again:
        raise DataError(f"{table} has several columns {again[0]!r}; give each a name of its own")
    by_name = {name.strip().lower().replace(" ", "_"): name for name in reversed(names)}
    asked = {name for view in (captions or {}).values() for name in view}
    found = _find_captions({short: name for short, name in by_name.items() if name not in asked})
    captions = {view: (captions or {}).get(view) or found[view] for view in found}
    wanted = [name for view in captions.values() for name in view] + ([image] if image else [])
    missing = sorted(set(wanted) - set(names))
    image = image or next((by_name[name] for name in IMAGE_COLUMNS if name in by_name), None)
    if missing or not image or not any(captions.values()):
        lacks = repr(missing[0]) if missing else "for the caption" if image else "for the image path"
        raise DataError(
            f"{table} has no column {lacks}, but {_listed(names)}; name those to read: with --csv-img-key and "
            "--csv-caption-key in training, with --image-column, --long-caption-column and --short-caption-column of "
            "scripts/build_shards.py"
        )
    return Columns(image, {view: list(columns) for view, columns in captions.items()})


def _listed(names: Sequence[str]) -> str:
    """Lists columns, if there are not too many, nor what no one would call a column."""
    listed = [name if len(name) <= _MAX_QUOTED else f"{name[:_MAX_QUOTED]}..." for name in names[:_MAX_QUOTED]]
    return ", ".join(listed if len(names) <= _MAX_QUOTED else [*listed, "..."])


def _find_captions(by_name: Mapping[str, str]) -> dict[str, list[str]]:
    several = {
        view: [by_name[n.lower()] for n in names if n.lower() in by_name] for view, names in SEVERAL_CAPTIONS.items()
    }
    if several["long"]:
        return several
    return {view: [by_name[n] for n in names if n in by_name][:1] for view, names in CAPTION_COLUMNS.items()}


def _row(place: Place, values: Mapping[str, Any], root: str, columns: Columns) -> Row | Lost:
    captions = {
        view: [text for name in names for text in _texts(values[name])] for view, names in columns.captions.items()
    }
    return make_row(place, values[columns.image], root, captions, values)


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text_rows(path: str, separator: str | None) -> Iterator[Any]:
    """Yields the header, then of every row its values by column, or the reason why it is lost."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        if separator is None:
            separator = "\t" if "\t" in stream.readline(MAX_HEADER_CHARACTERS) else ","
            stream.seek(0)
        records = _tab_records(stream) if separator == "\t" else _records(stream, separator)
        header = _header(records, path)
        if not header:
            raise DataError(f"{path} is empty; its first line must name the columns")
        yield header
        for values in records:
            if isinstance(values, str):
                yield values
            elif values:  # a blank line is none
                yield _by_column(header, values)


def _header(records: Iterator[list[str] | str], path: str) -> list[str]:
    """Returns the names of the columns.

    Raises:
        DataError: if what is read is no text.
    """
    header = next(records, [])
    if isinstance(header, str):  # it does not end
        raise DataError(f"{path} is no table: {header}; give a CSV, TSV or Parquet file")
    text = ",".join(header)
    if "\0" in text or not is_utf8(text):
        raise DataError(
            f"{path} is no table, since it begins with {text[:_MAX_QUOTED]!r}; give a Parquet file, or a CSV or TSV "
            "file in UTF-8"
        )
    return header


def _by_column(header: list[str], values: list[str]) -> dict[str, str] | str:
    if len(values) != len(header):
        return "row has another number of columns"
    if not all(map(is_utf8, values)):
        return "row is not UTF-8"
    return dict(zip(header, values, strict=True))


def _records(stream: Iterator[str], separator: str) -> Iterator[list[str] | str]:
    """Yields the values of every row, or the reason why it is lost; a value in quotes may go on over several lines.

    What a row took of the lines after its first one is read again if it is lost: it may be no more than a quote that
    is not closed, and every line is of a row. A value is at most as long as ``csv.field_size_limit()``, 131,072.
    """
    again: deque[str] = deque()
    while line := again.popleft() if again else next(stream, ""):
        taken = [line]
        try:
            values = next(csv.reader(_and_more(taken, again, stream), delimiter=separator, strict=True))
        except csv.Error:
            again.extendleft(reversed(taken[1:]))
            yield _too_long(line) or "row is not CSV"
        else:
            yield values


def _and_more(taken: list[str], again: deque[str], stream: Iterator[str]) -> Iterator[str]:
    """Yields the line that is taken, then those that follow it, and adds these to what is taken."""
    yield taken[0]
    while line := again.popleft() if again else next(stream, ""):
        taken.append(line)
        yield line


def _tab_records(stream: Iterator[str]) -> Iterator[list[str] | str]:
    """Yields the values of every line, or the reason why it is lost.

    Quotes around a value are no part of it only where that is how the whole line can be read, as programs write that
    quote: others write captions as they are, whose own quotes may be at either end, or not closed.
    """
    columns = 0  # of the header
    for line in stream:
        values: list[str] | str = []
        for rules in ({"strict": True}, {"quoting": csv.QUOTE_NONE}):
            try:
                values = next(csv.reader([line], delimiter="\t", **rules))
            except csv.Error:
                values = _too_long(line) or "row is not CSV"
                continue
            columns = columns or len(values)
            if len(values) == columns:
                break
        yield values


def _too_long(line: str) -> str:
    return "value is absurdly long" if len(line) > csv.field_size_limit() else ""


def _parquet_rows(path: str) -> Iterator[Any]:
    """Yields the columns, then the values of every row by column; columns of bytes are left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet files are read with the package pyarrow; pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as table:
            fields = [field for field in table.schema_arrow if not _is_binary(field.type)]
            names = [field.name for field in fields]
            yield names
            for batch in table.iter_batches(_BATCH, columns=names):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _is_binary(kind: Any) -> bool:
    """Tells whether an Arrow type holds bytes, itself or in what it is made of."""
    names = ("value_type", "key_type", "item_type", "storage_type")  # of lists, dictionaries, maps and extensions
    inner = [getattr(kind, name) for name in names if hasattr(kind, name)]
    if not inner:
        inner = [kind.field(index).type for index in range(kind.num_fields)]  # of a struct
    return any(map(_is_binary, inner)) or str(kind).startswith(("binary", "large_binary", "fixed_size_binary"))
