"""Finds the shards of a data set, and how many samples each holds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from braceexpand import braceexpand

from jettclip.data.counts import DataError
from jettclip.data.sizes import sizes_of
from jettclip.data.streams import is_local


class Shard(NamedTuple):
    """A tar file of samples, or a row of what is in no shards."""

    url: str
    size: int  # samples; 0 if unknown, which only resampling can do with
    weight: float = 1.0  # relative chance of being drawn when shards are resampled
    row: int = 0  # of what the url names, if that is no tar


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
    sizes = dict.fromkeys(names, 0) if resampled else sizes_of(names)
    shards = [Shard(url, sizes[url], weight) for url, weight in expanded]
    if not resampled and not any(shard.size for shard in shards):
        raise DataError(f"{urls!r} holds no samples: {len(shards)} shards, all empty or unreadable")
    return shards


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
