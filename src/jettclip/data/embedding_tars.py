"""Reads caption embeddings from tars beside the shards, as LLM2CLIP's code writes them (arXiv 2411.04997).

Beside ``00012.tar`` stands ``00012_text_embeddings.tar`` with members ``<key>.shortSV_captions`` and
``<key>.longSV_captions`` of raw little-endian float32. LLM2CLIP joins both by position; here they are joined by key.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jettclip.data.counts import DataError, Dropped, Tally
from jettclip.data.opened import Opened
from jettclip.data.streams import is_local
from jettclip.data.tar import split_name, stem_of, walk

OPEN_TARS = 16
"""Tars that stay open, since a shuffle buffer mixes the samples of several shards; 10,000 keys take some 6 MB."""

_MOST_BYTES = 2**20  # of one embedding


class EmbeddingTar:
    """An open tar of embeddings, of which only the positions are in memory.

    Raises:
        Dropped: if it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed when this object goes)
        except OSError as error:
            raise Dropped("text embeddings are missing", str(error)) from error
        weakref.finalize(self, self._file.close)
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        tally = Tally()  # what is damaged is logged; what it costs are keys, which are missed where they are wanted
        for member in walk(self._file, tally, path):
            key, extension = split_name(member.name) or ("", "")
            places = self._places.setdefault(key, {})
            if extension in places:
                tally.damage("member occurs twice in a sample", path)
            else:
                places[extension] = member.position, member.size

    def read(self, key: str) -> dict[str, bytes]:
        """Returns the members of a key, by extension in lower case.

        Raises:
            Dropped: if there is none, or one is cut short or no embedding for its size.
        """
        if key not in self._places:
            raise Dropped("text embeddings are missing", f"{self.path} has none of this key")
        return {extension: self._read(*place) for extension, place in self._places[key].items()}

    def _read(self, position: int, size: int) -> bytes:
        # pread has no position of its own, which forked workers would share
        data = os.pread(self._file.fileno(), size, position) if size <= _MOST_BYTES else b""
        if len(data) < size:
            raise Dropped("text embedding is cut short or too large", f"{len(data)} of {size} bytes in {self.path}")
        return data


class EmbeddingTars:
    """The tars of embeddings of all shards of a data set, opened when a sample asks for them.

    Args:
        shards: the shards beside which they stand.
        on_missing: ``error`` or ``drop``, for a sample whose embeddings are missing.

    Raises:
        DataError: if a shard is not on this machine; or if tars are missing, unless `on_missing` is ``drop`` and some
            are there.
    """

    def __init__(self, shards: Sequence[str], on_missing: str) -> None:
        self.on_missing = on_missing
        self._opened = Opened(_open, OPEN_TARS)
        remote = next((shard for shard in shards if not is_local(shard)), None)
        if remote:
            raise DataError(f"{remote!r} is not on this machine, so no tar of text embeddings can stand beside it")
        paths = [embedding_tar_path(shard) for shard in shards]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing and (on_missing == "error" or len(missing) == len(paths)):
            raise DataError(
                f"{len(missing)} of {len(paths)} tars of text embeddings are missing, the first is {missing[0]}; put "
                "them beside their shards, or read the captions as text: leave out --text-embeddings"
            )

    def members_of(self, group: Mapping[str, Any]) -> dict[str, bytes]:
        """Returns the embeddings of a sample, raw float32 by extension in lower case.

        Args:
            group: the sample, with its ``__key__`` and ``__shard__``.

        Raises:
            DataError: if there are none.
            Dropped: in the same case, if `on_missing` is ``drop``.
        """
        shard, key = group["__shard__"], group["__key__"]
        try:
            return self._opened.of(shard).read(key)
        except Dropped as problem:
            if self.on_missing == "drop":
                raise
            raise DataError(
                f"{shard}, sample {key}: {problem}; make {embedding_tar_path(shard)} again, or give "
                "--on-missing-features drop to go on without such samples"
            ) from problem


def embedding_tar_path(shard: str) -> str:
    """Returns where the text embeddings of a shard stand."""
    return stem_of(shard) + "_text_embeddings.tar"


def _open(shard: str) -> EmbeddingTar:
    return EmbeddingTar(embedding_tar_path(shard))
