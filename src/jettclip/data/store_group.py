"""The feature stores of a whole data set: one a shard and teacher, opened when a sample asks for its rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from jettclip.data.augmentation import StoredAugmentation
from jettclip.data.captions import Caption
from jettclip.data.counts import DataError, Dropped
from jettclip.data.features import Store, StoreInfo, digest, store_path
from jettclip.data.opened import Opened
from jettclip.data.policies import is_random
from jettclip.data.streams import is_local
from jettclip.types import AdapterInfo, TeacherFeatures, TeacherInfo

OPEN_SHARDS = 16
"""Shards whose stores stay open, since a shuffle buffer mixes the samples of several; 10,000 keys take some 2 MB."""


class Rows(NamedTuple):
    """What the stores say of one sample."""

    features: TeacherFeatures  # [Dt]
    augmentation: StoredAugmentation | None  # that the image features belong to


class StoreGroup:
    """The stores of one or several teachers for all shards of a data set, opened when a sample asks for them.

    Args:
        names: store names, in the order in which their columns stand side by side.
        folder: where they lie; beside the shards if empty.
        expected: what each store must say of itself.
        on_missing: ``error`` or ``drop``, for a sample whose features are missing, stale, or of another teacher.
    """

    members: frozenset[str] = frozenset()  # of the samples: none are read
    sees_upright = True  # its teachers saw images turned as their EXIF data says

    def __init__(self, names: Sequence[str], folder: str, expected: Sequence[StoreInfo], on_missing: str) -> None:
        self.names, self.folder, self.expected, self.on_missing = names, folder, expected, on_missing
        self.has_augmentations = any(info.augmentation for info in expected)  # that must be replayed on the images
        self._opened = Opened(self._open, OPEN_SHARDS)

    @property
    def teachers(self) -> list[TeacherInfo]:
        """The teachers, as the loss must know them."""
        return [
            teacher for name, info in zip(self.names, self.expected, strict=True) for teacher in info.teachers(name)
        ]

    def lookup(
        self, group: Mapping[str, Any], contents: Mapping[str, bytes | Caption], pick: Callable[[int], int]
    ) -> Rows:
        """Returns the features of one sample, the teachers side by side.

        Args:
            group: the sample's tar members, of which the key and the shard are read.
            contents: what to look up: ``image``, the encoded image, and the captions chosen as ``short`` and ``long``.
            pick: chooses one of so many augmentations of the image.

        Raises:
            DataError: if features are missing, stale, or of another teacher than the other shards'.
            Dropped: in the same cases, if `on_missing` is ``drop``.
        """
        shard, key = group["__shard__"], group["__key__"]
        try:
            return self._lookup(self._opened.of(shard), key, contents, pick)
        except Dropped as problem:
            if self.on_missing == "drop":
                raise
            raise DataError(
                f"{shard}, sample {key}: {problem}; extract the features of this shard again with "
                "scripts/extract_features.py --overwrite, or give --on-missing-features drop to go on without "
                "such samples"
            ) from problem

    def _lookup(
        self, stores: Sequence[Store], key: str, contents: Mapping[str, bytes | Caption], pick: Callable[[int], int]
    ) -> Rows:
        wanted = {
            part: digest(content if isinstance(content, bytes) else content.text) for part, content in contents.items()
        }
        try:
            places = [store.find_all(key, wanted) for store in stores]
        except Dropped as problem:
            _blame_policy(problem, contents)
            raise
        augmentation = None
        if self.has_augmentations and "image" in contents:
            which, augmentation = _choose(stores, [its["image"][0] for its in places], pick)
            for its in places:
                its["image"] = its["image"][0], which
        found = stores[0].read_all(places[0])
        if len(stores) > 1:
            rows = [found, *map(Store.read_all, stores[1:], places[1:])]
            found = [torch.cat(features) for features in zip(*rows, strict=True)]  # in the widest number format
        features = dict(zip(contents, found, strict=True))
        return Rows(TeacherFeatures(features.get("image"), features.get("short"), features.get("long")), augmentation)

    def _open(self, shard: str) -> list[Store]:
        stores = [Store(store_path(shard, name, self.folder)) for name in self.names]
        for store, expected in zip(stores, self.expected, strict=True):
            store.check(expected)
        return stores


def _blame_policy(problem: Dropped, contents: Mapping[str, bytes | Caption]) -> None:
    """Raises Dropped if a random policy is why a caption has no feature; the reason of `problem` begins with a part."""
    for part, content in contents.items():
        if isinstance(content, Caption) and is_random(content.policy) and problem.reason.startswith(part):
            raise Dropped(f"captions of a random policy have no {part} features", content.policy) from problem


def _choose(stores: Sequence[Store], rows: Sequence[int], pick: Callable[[int], int]) -> tuple[int, StoredAugmentation]:
    """Returns which of an image's augmentations to take, and the augmentation; each store has the image in its row."""
    drawn, *others = [store.drawn(row) for store, row in zip(stores, rows, strict=True)]
    if drawn is None or any(other != drawn for other in others):
        raise Dropped(
            "teachers saw different augmentations",
            f"{', '.join(store.path for store in stores)}; extract all of them with the same augmentations and seed",
        )
    which = pick(stores[0].augmentations)
    return which, drawn.choose(which, stores[0].augmentations)


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
        expected.append(_first_info([path for path in paths if os.path.exists(path)], on_missing))
    check_places(shards, folder)
    return StoreGroup(names, folder, expected, on_missing)


def _first_info(paths: Sequence[str], on_missing: str) -> StoreInfo:
    """Returns what the first of some stores says of its teacher, or if others may be lost, the first that is whole."""
    for path in paths:
        try:
            return Store(path).info
        except Dropped as problem:
            if on_missing == "error" or path == paths[-1]:
                raise DataError(f"{problem}; extract it again") from problem
    raise AssertionError("there is at least one path")


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
