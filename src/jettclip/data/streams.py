"""Opens shards, wherever they are, and reads their samples."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any, cast

import fsspec
import webdataset

from jettclip.data.counts import DataError, Tally
from jettclip.data.tar import read_samples


def open_shard(url: str) -> IO[bytes]:
    """Opens a shard for reading, seekable: a path, anything ``fsspec`` knows, or a ``pipe:`` command's output.

    Raises:
        DataError: if it cannot be opened.
    """
    try:
        if url.startswith("pipe:"):
            return _run(url)
        if not is_local(url):
            return cast("IO[bytes]", fsspec.open(url, "rb", compression="infer").open())
        path = url.removeprefix("file:")
        return cast("IO[bytes]", gzip.open(path)) if path.endswith("gz") else open(path, "rb")
    except OSError as error:
        raise DataError(f"shard {url!r} cannot be opened: {error}") from error


def read_shard(
    url: str, wanted: frozenset[str], tally: Tally, first: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the samples of a shard as `read_samples` does, each with the shard's url as ``__shard__``.

    Raises:
        DataError: if the shard cannot be opened.
    """
    with open_shard(url) as stream:
        for group in read_samples(stream, wanted, tally, url, first, stop):
            yield {**group, "__shard__": url}


def _run(url: str) -> IO[bytes]:
    """Returns the output of a ``pipe:`` command, copied to a file, since a pipe cannot be searched."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        with webdataset.gopen(url) as stream:
            shutil.copyfileobj(stream, copy)
    except OSError:
        copy.close()
        raise
    copy.seek(0)
    return cast("IO[bytes]", copy)


def is_local(url: str) -> bool:
    """Tells whether a url is a path on this machine."""
    return url.startswith("file:") or not (url.startswith("pipe:") or "://" in url)
