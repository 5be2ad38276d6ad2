"""Data that is in no shards, for ``--dataset-type`` csv, folder, json and synthetic; read by the same sample code."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jettclip.data.conversations import read_conversations
from jettclip.data.counts import DataError, Dropped, Tally, check_drop_rate, describe
from jettclip.data.folders import STRAY, read_folder
from jettclip.data.rows import Lost, Row, describe_row, read_picture
from jettclip.data.shards import Shard
from jettclip.data.tables import read_table

OPENCLIP_COLUMNS = ("filepath", "title")
"""What ``--csv-img-key`` and ``--csv-caption-key`` are unless given; columns are found by name then."""


class RowShards(Sequence[Shard]):
    """Every row as a shard of its own, so that a pass over the shards is a full shuffle; each is made when asked for.

    Args:
        url: names what the rows are of.
        count: rows.
    """

    def __init__(self, url: str, count: int) -> None:
        self.url, self._rows = url, range(count)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        return [self[i] for i in row] if isinstance(row, range) else Shard(self.url, 1, 1.0, row)

    def __iter__(self) -> Iterator[Shard]:
        return (Shard(self.url, 1, 1.0, row) for row in self._rows)


class RowSource:
    """Pictures in files of their own, with captions from a list of rows.

    The rows lie in a temporary file, which all loader processes map, however they are started: lists of Python objects
    would be copied to each of them, little by little, as it counts its references.

    Args:
        path: names the list in messages, and its feature stores.
        rows: its rows, and the inputs that make none.
        max_drop_rate: share of the inputs that may be lost.

    Raises:
        DataError: if there are no rows, too many inputs are lost, or there is no space for the temporary file.
    """

    row_by_row = True

    def __init__(self, path: str, rows: Iterable[Row | Lost], max_drop_rate: float = 1.0) -> None:
        lost = Counter[str]()
        try:
            self._packed, self._ends = _write(rows, lost, path)
        except OSError as error:
            raise DataError(f"the rows of {path!r} cannot be kept in a temporary file: {error}; set TMPDIR") from error
        count = len(self._ends) - 1
        if not count:
            raise DataError(f"{path!r} has no row that makes a sample; lost: {describe(lost)}{_hint(path)}")
        samples = Counter({reason: times for reason, times in lost.items() if reason != STRAY})
        check_drop_rate(count, samples, max_drop_rate)
        self.shards: Sequence[Shard] = RowShards(path, count)
        self.lost: dict[str, int] = dict(lost)

    def read(
        self, shard: Shard, wanted: frozenset[str], tally: Tally, first: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yields the sample of a row: its picture as ``jpg``, whatever the format, columns and captions as ``json``.

        The captions are the keys ``short_caption`` and ``long_caption``, each a text or a list of them. The path of the
        picture is ``__image__``. A sample whose picture cannot be read has no ``jpg``, so that it is counted.
        """
        start, end = self._ends[shard.row : shard.row + 2].tolist()
        key, image, columns = self._packed[start:end].numpy().tobytes().split(b"\0", 2)
        path = os.fsdecode(image)
        group = {"__key__": os.fsdecode(key), "__shard__": shard.url, "__image__": path, "json": columns}
        with suppress(Dropped):  # without a picture it is dropped where samples are counted
            group["jpg"] = read_picture(path)
        yield group


def _hint(path: str) -> str:
    """Says how to read the shards in a folder, if there are any."""
    if not os.path.isdir(path) or not any(name.endswith((".tar", ".tar.gz")) for name in os.listdir(path)):
        return ""
    return f"; shards are named one by one, such as '{os.path.join(path, '{000000..000099}.tar')}'"


def _write(rows: Iterable[Row | Lost], lost: Counter[str], path: str) -> tuple[Tensor, Tensor]:
    """Writes rows one after the other; returns their bytes, uint8, and where each begins and the last ends, int64."""
    ends = array("q", [0])
    with tempfile.NamedTemporaryFile() as stream:  # its content stays for as long as it is mapped
        for row in rows:
            if isinstance(row, Row):
                ends.append(ends[-1] + stream.write(_pack(row)))
            else:
                if row.reason not in lost:
                    logging.warning(f"{path}: lost {row.where}: {row.reason} (further ones are only counted)")
                lost[row.reason] += 1
        stream.flush()
        packed = torch.from_file(stream.name, shared=True, size=ends[-1], dtype=torch.uint8)
    return packed, torch.frombuffer(ends, dtype=torch.int64)


def _pack(row: Row) -> bytes:
    columns = json.dumps(describe_row(row), ensure_ascii=False, default=str).encode("utf-8", "replace")
    names = [os.fsencode(name).replace(b"\0", b"?") for name in (row.key, row.image)]  # no file has it in its name
    return b"\0".join([*names, columns])


class SyntheticSource:
    """One picture with one caption, over and over, to measure everything but the data (as OpenCLIP's).

    Args:
        count: samples.
    """

    row_by_row = True
    lost: dict[str, int] = {}

    def __init__(self, count: int) -> None:
        self.shards: Sequence[Shard] = RowShards("synthetic", count)

    @cached_property
    def _members(self) -> dict[str, bytes]:
        rows, columns = np.mgrid[:224, :224]  # decoded and transformed like any other
        pixels = np.stack([rows % 256, columns % 256, (rows + columns) % 256], 2).astype(np.uint8)
        stream = BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG")
        captions = {"short_caption": "Dummy caption", "long_caption": "Dummy caption. It is longer."}
        return {"jpg": stream.getvalue(), "json": json.dumps(captions).encode()}

    def read(
        self, shard: Shard, wanted: frozenset[str], tally: Tally, first: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yields one sample, whose key is the number of the row."""
        yield {"__key__": f"{shard.row:09d}", "__shard__": shard.url, **self._members}


def open_rows(
    dataset_type: str,
    path: str,
    *,
    separator: str = "\t",
    image_column: str = OPENCLIP_COLUMNS[0],
    caption_column: str = OPENCLIP_COLUMNS[1],
    num_samples: int | None = None,
    image_root: str | None = None,
    max_drop_rate: float = 1.0,
) -> RowSource | SyntheticSource:
    """Opens data that is in no shards, and reads which pictures and captions there are.

    Args:
        dataset_type: ``csv`` (also TSV and Parquet), ``folder``, ``json`` or ``synthetic``.
        path: of the table, folder or JSON file; of no meaning for ``synthetic``.
        separator: of the table; a tab, as OpenCLIP has it unless told, is taken for a comma if the header has none.
        image_column: of the table, with the paths of the pictures; unless given, it is found by its name.
        caption_column: with the long captions, likewise.
        num_samples: of ``synthetic``, where it must be given.
        image_root: folder of the pictures that a table or JSON file names; its own by default.
        max_drop_rate: share of the inputs that may be lost.

    Raises:
        DataError: if there is nothing at `path`, no row makes a sample, or too many are lost.
        ValueError: if a column is missing, or a package to read the file.
    """
    if dataset_type == "synthetic":
        if not num_samples:
            raise DataError("--dataset-type synthetic has no end; say with --train-num-samples how long an epoch is")
        return SyntheticSource(num_samples)
    if not os.path.exists(path):
        raise DataError(f"{path!r} does not exist; give the {dataset_type} to train on, one path without braces or ::")
    logging.info(f"Reading the rows of {path}")
    if dataset_type == "folder":
        return RowSource(path, read_folder(path), max_drop_rate)
    if dataset_type == "json":
        return RowSource(path, read_conversations(path, image_root), max_drop_rate)
    separator = separator.replace("\\t", "\t")
    if len(separator) != 1:
        raise DataError(f"--csv-separator {separator!r} must be one character, such as ','")
    rows = read_table(  # looks at the header for what is not asked for
        path,
        image_root,
        None if image_column == OPENCLIP_COLUMNS[0] else image_column,
        None if caption_column == OPENCLIP_COLUMNS[1] else {"long": [caption_column]},
        None if separator == "\t" else separator,
    )
    return RowSource(path, rows, max_drop_rate)
