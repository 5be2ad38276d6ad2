"""Where the samples of a data set come from: what the pipeline must know of it, and data sets in shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from jettclip.data.counts import Tally
from jettclip.data.shards import Shard, find_shards
from jettclip.data.streams import read_shard


class Source(Protocol):
    """A data set that can be read in pieces.

    Attributes:
        row_by_row: whether each shard is a single sample.
        shards: the pieces that an epoch is made of, shuffled anew in each pass over the data.
        lost: inputs that make no sample, by reason, as far as they are known before anything is read.
    """

    row_by_row: bool
    shards: Sequence[Shard]
    lost: dict[str, int]

    def read(
        self, shard: Shard, wanted: frozenset[str], tally: Tally, first: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yields the samples with index `first` to `stop` as ``{"__key__": str, "__shard__": str, "jpg": bytes}``."""


class ShardSource:
    """Samples in webdataset shards.

    Raises:
        DataError: if shards are missing, or hold no samples at all.
    """

    row_by_row = False
    lost: dict[str, int] = {}

    def __init__(
        self,
        urls: str | Sequence[str],
        weights: str | None = None,
        *,
        resampled: bool = False,
        allow_pipe: bool = False,
    ) -> None:
        self.shards: Sequence[Shard] = find_shards(urls, weights, resampled=resampled, allow_pipe=allow_pipe)

    def read(
        self, shard: Shard, wanted: frozenset[str], tally: Tally, first: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yields samples of a shard; those that are not there are counted, as far as it is known what should be."""
        empty = True
        for group in read_shard(shard.url, wanted, tally, first, stop, shard.size):
            empty = False
            yield group
        if empty and stop is None:  # a shard that was drawn, and never counted
            tally.drop("shard holds no samples", shard.url)
