"""Opens shards, wherever they are, and reads their samples."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any, cast

import fsspec
import webdataset

from jettclip.data.counts import DataError, Tally
from jettclip.data.manifest import Manifest, ManifestReader, manifest_path, parse_manifest
from jettclip.data.tar import read_samples

SIZES = "sizes.json"


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
    url: str, wanted: frozenset[str], tally: Tally, first: int = 0, stop: int | None = None, size: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields the samples `first` to `stop` of a shard as `read_samples` does, with its url as ``__shard__``.

    Where the shard has a manifest, `first` and `stop` are places in it, only samples that are what it says are yielded,
    and each that is not is counted in `tally` by reason. Without one, samples that are lost are counted if the shard is
    known to hold `size` of them.

    Raises:
        DataError: if the shard cannot be opened.
    """
    try:
        manifest = find_manifest(url)
    except DataError as error:
        if first == 0:  # one of all its readers counts it
            tally.damage("manifest cannot be read", f"{url}: {error}")
        manifest = None
    with open_shard(url) as stream:
        if manifest is not None:
            if stop == size != len(manifest):
                tally.damage(f"manifest and {SIZES} differ in the number of samples", url)
            groups = ManifestReader(manifest, wanted, tally, url, first, stop).read(stream)
        else:
            end = None if stop == size else stop  # what follows the last sample is looked at too
            groups = read_samples(stream, wanted, tally, url, first, end)
            if stop is not None and size:
                groups = _counted(groups, stop - first, tally, url)
        for group in _all_counted(groups):
            yield {**group, "__shard__": url}


def _counted(groups: Iterator[dict[str, Any]], count: int, tally: Tally, shard: str) -> Iterator[dict[str, Any]]:
    """Yields so many groups, and counts those that are not there, or that there are more."""
    read = 0
    for group in islice(groups, count):
        read += 1
        yield group
    if read < count:
        tally.lose("shard holds fewer samples than it did when counted", shard, count - read)
    elif next(groups, None) is not None:
        tally.damage("shard holds more samples than it did when counted", shard)


def _all_counted(groups: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Hands the last group on only when everything after it was counted, since no one may ask for another."""
    held = next(groups, None)
    for group in groups:
        assert held is not None
        yield held
        held = group
    if held is not None:
        yield held


def find_manifest(url: str) -> Manifest | None:
    """Reads the manifest of a shard; None if there is none.

    Raises:
        DataError: if there is one that cannot be read.
    """
    if url.startswith("pipe:"):
        return None
    path, local = manifest_path(url), is_local(url)
    try:
        with open(path, "rb") if local else fsspec.open(path, "rb").open() as stream:
            return parse_manifest(stream.read(), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if not local:  # object stores also answer so where there is no such file
            return None
        raise DataError(f"{path} cannot be read: {error}") from error


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
