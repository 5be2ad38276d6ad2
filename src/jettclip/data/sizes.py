"""Knows how many samples each shard holds: from a ``sizes.json`` beside it, as OpenCLIP's, its manifest, or counting.

What was found is written to that file, so that only the first start counts. A shard that is newer than its
``sizes.json``, whoever wrote that, is looked at again; by its manifest, what damage took from it is expected still. A
change that keeps an old date is noticed when the shard is read: it then ends before the recorded number of samples, or
goes on after it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor

import fsspec
from tqdm import tqdm

from jettclip.data.counts import DataError, Tally
from jettclip.data.manifest import manifest_path
from jettclip.data.streams import SIZES, find_manifest, is_local, open_shard
from jettclip.data.tar import read_samples
from jettclip.files import whole_file


def sizes_of(urls: Iterable[str]) -> dict[str, int]:
    """Returns the samples of each shard, and records those that had to be counted beside their shards.

    A folder that cannot be written to costs no more than counting again at the next start.

    Raises:
        DataError: if a ``sizes.json`` cannot be read.
    """
    urls = list(dict.fromkeys(urls))
    recorded = {folder: _recorded(folder) for folder in {_folder(url) for url in urls}}
    sizes = {url: recorded[_folder(url)].get(os.path.basename(url)) for url in urls}
    known = {url: size for url, size in sizes.items() if size is not None}
    to_count = [url for url in urls if url not in known]
    remote = sum(not is_local(url) for url in to_count)
    if remote:
        logging.warning(
            f"Counting the samples of {remote} remote shards, which reads each of them once; to save that, put a "
            'sizes.json beside them ({"000000.tar": 1000, ...}), or give --dataset-resampled and --train-num-samples'
        )
    new: dict[str, dict[str, int]] = defaultdict(dict)
    try:
        for url, size in _count(to_count):
            known[url] = size
            if is_local(url) and size:  # a recorded 0 would keep the shard from being opened, whatever it holds later
                new[_folder(url)][os.path.basename(url)] = size
    finally:  # what was counted before a stop need not be counted again
        for folder, found in new.items():
            _record(folder, recorded[folder] | found, len(found))
    empty = [url for url in urls if not known[url]]
    if empty:
        logging.warning(
            f"{len(empty)} of {len(urls)} shards hold no samples, or are no tar files; the first is {empty[0]}"
        )
    return known


def _folder(url: str) -> str:
    return os.path.dirname(url.removeprefix("file:") if is_local(url) else url)


def _count(urls: list[str]) -> Iterator[tuple[str, int]]:
    """Counts samples by manifests, or else tar headers, on all cores where there is enough to do."""
    if len(urls) < 16:
        yield from ((url, _count_one(url)) for url in urls)
        return
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        counts = tqdm(
            pool.map(_count_one, urls, chunksize=4), "counting samples", len(urls), unit="shard", disable=None
        )
        yield from zip(urls, counts, strict=True)


def _count_one(url: str) -> int:
    try:
        manifest = find_manifest(url)
    except DataError as error:
        logging.warning(f"the shard is counted instead: {error}")
        return _count_headers(url)
    return _count_headers(url) if manifest is None else len(manifest)


def _count_headers(url: str) -> int:
    with open_shard(url) as stream:
        return sum(1 for _ in read_samples(stream, frozenset(), Tally(), url))


def _recorded(folder: str) -> dict[str, int]:
    """Reads a ``sizes.json``, samples by shard name, if there is one; leaves out local shards that are newer."""
    if folder.startswith("pipe:"):
        return {}
    path, local = os.path.join(folder, SIZES), is_local(folder)
    try:
        with open(path, encoding="utf-8") if local else fsspec.open(path, "r", encoding="utf-8") as stream:
            sizes = {name: int(size) for name, size in json.load(stream).items()}
            if not local:
                return sizes
            written = os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if not local and isinstance(error, OSError):  # object stores also answer so where there is no such file
            logging.warning(f"{path} cannot be read, so the shards are counted: {error}")
            return {}
        raise DataError(
            f'{path} is not {{"000000.tar": 1000, ...}}, samples by shard: {error}; mend it, or delete it to have '
            "them counted"
        ) from error
    return {name: size for name, size in sizes.items() if not _has_changed(os.path.join(folder, name), written)}


def _has_changed(shard: str, since: int) -> bool:
    """Tells whether a shard, or its manifest, is newer than a time."""
    for path in (shard, manifest_path(shard)):
        with contextlib.suppress(OSError):
            if os.stat(path).st_mtime_ns > since:
                return True
    return False


def _record(folder: str, sizes: Mapping[str, int], counted: int) -> None:
    """Writes a ``sizes.json``, if the folder lets us."""
    path = os.path.join(folder, SIZES)
    try:
        write_sizes(folder, sizes)
    except OSError as error:
        logging.info(f"Counted {counted} shards; every start will, since {path} cannot be written: {error}")
    else:
        logging.info(f"Counted {counted} shards, and wrote their sizes to {path}")


def write_sizes(folder: str, sizes: Mapping[str, int]) -> None:
    """Writes the ``sizes.json`` of a folder: samples by shard name.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    with whole_file(os.path.join(folder, SIZES)) as partial, open(partial, "w", encoding="utf-8") as stream:
        json.dump(dict(sorted(sizes.items())), stream, indent=1)
