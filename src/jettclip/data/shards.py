"""Finds the shards of a data set and how many samples each holds; opens them, wherever they are."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import IO, Any, NamedTuple, cast

import fsspec
import torch.distributed as dist
import webdataset
from braceexpand import braceexpand
from tqdm import tqdm

from jettclip.data.counts import DataError, Tally
from jettclip.data.tar import read_samples


class Shard(NamedTuple):
    """A tar file of samples."""

    url: str
    size: int  # samples; 0 if unknown, which only resampling can do with
    weight: float = 1.0  # relative chance of being drawn when shards are resampled


def expand_urls(urls: str | Sequence[str], weights: str | None = None) -> list[tuple[str, float]]:
    """Expands ``a/{000..010}.tar::b/{0..3}.tar`` (or a list of such) into urls, each with its source's weight.

    Raises:
        ValueError: if `weights` (``2::1``) does not have one positive number a source, or a brace is left open.
    """
    sources = urls.split("::") if isinstance(urls, str) else list(urls)
    try:
        factors = [float(factor) for factor in weights.split("::")] if weights else [1.0] * len(sources)
    except ValueError:
        factors = []
    if len(factors) != len(sources) or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(
            f"--train-data-upsampling-factors {weights!r} does not weigh the {len(sources)} sources of --train-data; "
            "give one positive number a source, separated by ::"
        )
    return [(url, factor) for source, factor in zip(sources, factors, strict=True) for url in braceexpand(source)]


def find_shards(
    urls: str | Sequence[str],
    weights: str | None = None,
    *,
    resampled: bool = False,
    allow_pipe: bool = False,
) -> list[Shard]:
    """Returns the shards of `urls` with their sizes, which come from a ``sizes.json`` beside them or from counting.

    In a process group, rank 0 counts and the others are told.

    Raises:
        DataError: for a shard that is missing or may not be opened, or if there are no samples at all.
    """
    if not dist.is_initialized():
        return _find_shards(urls, weights, resampled, allow_pipe)
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer[0] = _find_shards(urls, weights, resampled, allow_pipe)
        except ValueError as error:  # is told too: the others must not wait for an answer that never comes
            answer[0] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    return cast("list[Shard]", answer[0])


def _find_shards(urls: str | Sequence[str], weights: str | None, resampled: bool, allow_pipe: bool) -> list[Shard]:
    expanded = expand_urls(urls, weights)
    names = [url for url, _ in expanded]
    _check_urls(names, allow_pipe)
    sizes = dict.fromkeys(names, 0) if resampled else _sizes(names)
    shards = [Shard(url, sizes[url], weight) for url, weight in expanded]
    if not resampled and not any(shard.size for shard in shards):
        raise DataError(f"{urls!r} holds no samples: {len(shards)} shards, all empty or unreadable")
    return shards


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


def _check_urls(urls: Iterable[str], allow_pipe: bool) -> None:
    missing = []
    for url in urls:
        if url.startswith("pipe:") and not allow_pipe:
            raise DataError(
                f"{url!r} would run a shell command; give --allow-pipe-urls if you trust where it comes from"
            )
        if is_local(url) and not os.path.isfile(url.removeprefix("file:")):
            missing.append(url)
    if missing:
        raise DataError(f"{len(missing)} shards do not exist, the first is {missing[0]!r}; check the braces of the url")


def _sizes(urls: list[str]) -> dict[str, int]:
    """Returns the samples of each shard, from OpenCLIP's ``sizes.json`` beside it or from counting."""
    recorded = {folder: _recorded_sizes(folder) for folder in {os.path.dirname(url) for url in urls}}
    known = {url: recorded[os.path.dirname(url)].get(os.path.basename(url)) for url in urls}
    sizes = {url: size for url, size in known.items() if size is not None}
    to_count = [url for url in known if url not in sizes]
    remote = sum(not is_local(url) for url in to_count)
    if remote:
        logging.warning(
            f"Counting the samples of {remote} remote shards, which reads each of them once; to save that, put a "
            'sizes.json beside them ({"000000.tar": 1000, ...}), or give --dataset-resampled and --train-num-samples'
        )
    return {**sizes, **_count(to_count)}


def _count(urls: list[str]) -> dict[str, int]:
    """Counts samples by reading tar headers, on all cores where there is enough to do."""
    if len(urls) < 16:
        return {url: _count_one(url) for url in urls}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        counts = tqdm(
            pool.map(_count_one, urls, chunksize=4), "counting samples", len(urls), unit="shard", disable=None
        )
        return dict(zip(urls, counts, strict=True))


def _count_one(url: str) -> int:
    with open_shard(url) as stream:
        return sum(1 for _ in read_samples(stream, frozenset(), Tally(), url))


def _recorded_sizes(folder: str) -> dict[str, int]:
    """Reads a ``sizes.json``, samples by shard name, if there is one."""
    path = os.path.join(folder.removeprefix("file:"), "sizes.json")
    try:
        with open(path, encoding="utf-8") if is_local(folder) else fsspec.open(path, "r", encoding="utf-8") as stream:
            return {name: int(size) for name, size in json.load(stream).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} is not {{"000000.tar": 1000, ...}}, samples by shard: {error}; mend it, or delete it to have '
            "them counted"
        ) from error
