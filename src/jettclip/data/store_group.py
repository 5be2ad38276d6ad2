"""The feature stores of a whole data set: one a shard and teacher, opened when a sample asks for its rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from jettclip.data.counts import DataError, Dropped
from jettclip.data.features import Store, StoreInfo, store_path
from jettclip.data.streams import is_local
from jettclip.types import AdapterInfo, TeacherFeatures, TeacherInfo

OPEN_SHARDS = 16
"""Shards whose stores stay open, since a shuffle buffer mixes the samples of several; 10,000 keys take some 2 MB."""


class StoreGroup:
    """The stores of one or several teachers for all shards of a data set, opened when a sample asks for them.

    Args:
        names: store names, in the order in which their columns stand side by side.
        folder: where they lie; beside the shards if empty.
        expected: what each store must say of itself.
        on_missing: ``error`` or ``drop``, for a sample whose features are missing, stale, or of another teacher.
    """

    def __init__(self, names: Sequence[str], folder: str, expected: Sequence[StoreInfo], on_missing: str) -> None:
        self.names, self.folder, self.expected, self.on_missing = names, folder, expected, on_missing
        self._opened: dict[str, list[Store] | Dropped] = {}

    @property
    def teachers(self) -> list[TeacherInfo]:
        """The teachers, as the loss must know them."""
        return [
            TeacherInfo(name, info.width, info.logit_scale)
            for name, info in zip(self.names, self.expected, strict=True)
        ]

    def lookup(self, shard: str, key: str, contents: Mapping[str, bytes | str]) -> TeacherFeatures:
        """Returns the features [Dt] of one sample, for the parts in `contents`, the teachers side by side.

        Raises:
            DataError: if they are missing, stale, or of another teacher than the other shards'.
            Dropped: in the same cases, if `on_missing` is ``drop``.
        """
        try:
            stores = self._stores(shard)
            found = {
                part: torch.cat([store.row(part, key, content) for store in stores])
                for part, content in contents.items()
            }
        except Dropped as problem:
            if self.on_missing == "drop":
                raise
            raise DataError(
                f"{shard}, sample {key}: {problem}; extract the features of this shard again with "
                "scripts/extract_features.py --overwrite, or give --on-missing-features drop to go on without "
                "such samples"
            ) from problem
        return TeacherFeatures(found.get("image"), found.get("short"), found.get("long"))

    def _stores(self, shard: str) -> list[Store]:
        """Returns the open stores of a shard, or raises Dropped with what is wrong with them."""
        if shard not in self._opened:
            if len(self._opened) == OPEN_SHARDS:
                del self._opened[next(iter(self._opened))]  # the one opened first
            try:
                self._opened[shard] = self._open(shard)
            except Dropped as problem:
                self._opened[shard] = problem
        stores = self._opened[shard]
        if isinstance(stores, Dropped):
            raise stores.with_traceback(None)  # or it would collect the frames of every sample of the shard
        return stores

    def _open(self, shard: str) -> list[Store]:
        stores = [Store(store_path(shard, name, self.folder)) for name in self.names]
        for store, expected in zip(stores, self.expected, strict=True):
            store.check(expected)
        return stores


def open_stores(shards: Sequence[str], names: Sequence[str], folder: str, on_missing: str) -> StoreGroup:
    """Checks that the shards have their stores, and takes from the first one of each name what they must hold.

    Raises:
        DataError: naming what is missing, unless `on_missing` is ``drop`` and some are there; or for shards in several
            folders that would share one store.
    """
    expected = []
    for name in names:
        paths = [store_path(shard, name, folder) for shard in shards]
        missing = [path for path in paths if not os.path.exists(path)]
        if len(missing) == len(paths) or (missing and on_missing == "error"):
            raise DataError(
                f"{len(missing)} of {len(paths)} stores of {name!r} are missing, the first is {missing[0]}; "
                "extract them with scripts/extract_features.py, or check the name and --features-dir"
            )
        try:
            expected.append(Store(next(path for path in paths if os.path.exists(path))).info)
        except Dropped as problem:
            raise DataError(f"{problem}; extract it again") from problem
    check_places(shards, folder)
    return StoreGroup(names, folder, expected, on_missing)


def check_width(stores: StoreGroup, adapter: AdapterInfo) -> None:
    """Raises DataError if text embeddings of these stores are of another width than the adapter reads."""
    for name, info in zip(stores.names, stores.expected, strict=True):
        if info.width != adapter.width:
            raise DataError(
                f"the embeddings of store {name!r} have width {info.width}, and {adapter.model} reads {adapter.width}; "
                "choose the --model for that width, or another store with --text-embeddings"
            )


def check_places(shards: Sequence[str], folder: str) -> None:
    """Raises DataError if stores of these shards would have no place, or share one."""
    remote = next((shard for shard in shards if not is_local(shard)), None)
    if remote and not folder:
        raise DataError(f"{remote!r} is not on this machine, so its stores cannot stand beside it; give --features-dir")
    if folder and len({os.path.basename(shard) for shard in shards}) < len(set(shards)):
        raise DataError(
            f"shards of the same name in several folders would share one store in --features-dir {folder}; "
            "leave the flag out and keep the stores beside their shards"
        )
