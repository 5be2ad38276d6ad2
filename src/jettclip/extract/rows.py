"""The store of one shard: its rows until it is whole, and whether there is one already."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jettclip.data.counts import DataError, Dropped
from jettclip.data.decode import IMAGE_EXTENSIONS
from jettclip.data.features import Store, StoreInfo, write_store
from jettclip.data.manifest import Manifest
from jettclip.data.streams import find_manifest
from jettclip.extract.reader import Chunk


@dataclass
class ShardRows:
    """The rows of one shard's store, until it is whole."""

    keys: list[str] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    digests: dict[str, list[list[bytes]]] = field(default_factory=lambda: defaultdict(list))
    augmentations: list[str] = field(default_factory=list)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)  # samples without a row, by reason
    damaged: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def add(self, chunk: Chunk, features: dict[str, Tensor]) -> None:
        """Adds samples with what the models say of them."""
        self.dropped.update(chunk.info.dropped)
        self.damaged.update(chunk.info.damaged)
        self.noted.update(chunk.info.noted)
        self.keys += chunk.info.keys
        self.augmentations += chunk.augmentations
        self.image_sizes += chunk.image_sizes
        for part, rows in features.items():
            self.features[part].append(rows.cpu())
            self.digests[part] += chunk.digests[part]
        for view, counts in chunk.counts.items():
            self.counts[view] += counts

    def write(self, path: str, info: StoreInfo, dtype: torch.dtype) -> None:
        """Writes the store.

        Raises:
            DataError: if it cannot be written.
        """
        features = {part: torch.cat(rows) for part, rows in self.features.items()}
        for part, rows in features.items():
            is_image = part == "image"
            features[part] = rows.view(len(self.keys), -1, rows.shape[1]) if is_image else _pad(rows, self.counts[part])
        drawn = {"augmentations": self.augmentations, "image_sizes": self.image_sizes} if info.augmentation else {}
        write_store(path, self.keys, features, self.digests, info, dtype=dtype, **drawn)  # type: ignore[arg-type]


def _pad(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Spreads the rows [sum of counts, D] of samples over [N, most of them, D], with zeros where there are fewer."""
    which = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
    padded = rows.new_zeros(*which.shape, rows.shape[1])
    padded[which] = rows
    return padded


class Wanted(NamedTuple):
    """What the store of a shard must be."""

    info: StoreInfo
    parts: set[str]
    dtype: torch.dtype


class State(Enum):
    """What is to become of the store of a shard."""

    WRITE = "to be written"
    KEEP = "kept, its keys and images are those of the manifest"
    UNREAD = "kept, and not held against its shard, which has no manifest"


def state_of(path: str, url: str, wanted: Wanted) -> State:
    """Tells whether a store has what is asked for; one that cannot be read, or lacks a part, has not.

    Where the shard has a manifest, keys and images of the store's rows are held against it.

    Raises:
        DataError: if the store has what nobody asked to lose: rows of other models, of other data or of other captions.
    """
    try:
        store = Store(path)
    except Dropped:
        return State.WRITE
    different = _different(store, wanted)
    if different:
        raise DataError(
            f"{path} is there and differs in {'; '.join(different)}; choose another --store or --features-dir, or "
            "delete it, or give --overwrite"
        )
    if not wanted.parts <= store.parts and not store.parts <= wanted.parts:
        raise DataError(
            f"{path} holds {', '.join(sorted(store.parts))}, and {', '.join(sorted(wanted.parts))} are asked for; "
            "ask for all of them at once, or give --overwrite"
        )
    try:
        manifest = find_manifest(url)
    except DataError:  # which is reported when the shard is read
        manifest = None
    if manifest is not None:
        _check_data(store, url, manifest)
    if not wanted.parts <= store.parts:
        return State.WRITE
    return State.UNREAD if manifest is None else State.KEEP


def _different(store: Store, wanted: Wanted) -> list[str]:
    """Returns what a store says otherwise than is wanted, in words."""
    there, asked = _described(store.info, store.dtype), _described(wanted.info, wanted.dtype)
    names = [name for name in asked if there.get(name) != asked[name]]
    if len(names) > 1 and "preprocess" in names:
        names.remove("preprocess")  # of which the others are parts
    return [f"{name} ({there.get(name)!r} there, {asked[name]!r} asked for)" for name in names]


def _described(info: StoreInfo, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what a store says of itself, with what its `preprocess` says one by one, if that is JSON."""
    try:
        how = dict(json.loads(info.preprocess))
    except (TypeError, ValueError, RecursionError):
        how = {}
    return {**how, **asdict(info), "dtype": str(dtype).removeprefix("torch.")}


def _check_data(store: Store, url: str, manifest: Manifest) -> None:
    """Raises DataError if rows of a store are not of the samples that a shard has by its manifest."""
    for key in store.keys:
        members = manifest.get(key)
        image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None) if members else None
        try:
            if members is None:
                raise Dropped("sample is not in the shard any more")
            if "image" in store.parts and image is not None:
                store.find("image", key, bytes.fromhex(image))
        except (Dropped, ValueError) as problem:
            raise DataError(
                f"{store.path} does not fit {url}: sample {key}: {problem}; choose another --features-dir, or delete "
                "it, or give --overwrite"
            ) from problem
