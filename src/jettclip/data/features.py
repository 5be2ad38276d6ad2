"""Feature stores: what a teacher said of every sample of a shard, computed once and kept beside it.

A store is one safetensors file a shard, ``000012.<name>.safetensors`` for ``000012.tar``:

    image [N, A, D]   short [N, K, D]   long [N, K, D]     bfloat16 by default; any of them may be absent
    image_digest [N, 8]   short_digest [N, K, 8]   long_digest [N, K, 8]     uint8

for N samples, A augmentations of the image (1 without reinforcement) and K captions, with the keys, the teacher and its
preprocessing in the metadata. Rows are found by key, never by position, and the digests tell a row whose image or
caption has changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jettclip.data.counts import DataError, Dropped
from jettclip.types import TeacherFeatures, TeacherInfo

FORMAT = "1"
PARTS = ("image", "short", "long")
OPEN_SHARDS = 16
"""Shards whose stores stay open, since a shuffle buffer mixes the samples of several; 10,000 keys take some 2 MB."""


@dataclass(frozen=True)
class StoreInfo:
    """What a store's metadata says of the model that filled it; stores of one name must agree on all of it."""

    model: str
    weights_digest: str
    logit_scale: float  # S = exp(logit_scale)
    normalized: bool
    preprocess: str  # JSON
    width: int


def digest(content: bytes | str) -> bytes:
    """Returns the 8 bytes that a store keeps of an image's bytes or a caption's text."""
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=8).digest()


def store_path(shard: str, name: str, folder: str = "") -> str:
    """Returns where the store `name` of a shard lies: in `folder`, or beside the shard."""
    stem = shard.removeprefix("file:").removesuffix(".gz").removesuffix(".tar")
    return os.path.join(folder or os.path.dirname(stem), f"{os.path.basename(stem)}.{name}.safetensors")


def write_store(
    path: str | os.PathLike[str],
    keys: Sequence[str],
    features: Mapping[str, Tensor],
    digests: Mapping[str, Sequence[bytes]],
    info: StoreInfo,
) -> None:
    """Writes a store; the file appears only when it is whole.

    Args:
        path: file to write, as `store_path` names it.
        keys: sample keys, in the order of the rows.
        features: tensors ``image``, ``short``, ``long``, each [N, D] (one augmentation, one caption) or [N, A, D].
        digests: for each of them, one `digest` a row.
        info: the teacher.
    """
    tensors = {part: rows if rows.ndim == 3 else rows.unsqueeze(1) for part, rows in features.items()}
    for part, rows in digests.items():
        table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
        tensors[f"{part}_digest"] = table.view((len(keys), 8) if part == "image" else (len(keys), 1, 8))
    if any(len(rows) != len(keys) for rows in tensors.values()):
        raise ValueError(f"{path}: {len(keys)} keys for rows of { ({k: len(v) for k, v in tensors.items()}) }")
    metadata = {name: str(value) for name, value in asdict(info).items()}
    metadata |= {"jettclip_store": FORMAT, "keys": json.dumps(list(keys))}
    partial = f"{path}.{os.getpid()}.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    with open(partial, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)


class Store:
    """An open store of one shard.

    Raises:
        Dropped: if the file is missing, or is no store.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._open()
        except FileNotFoundError as error:
            raise Dropped("feature store is missing", path) from error
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise Dropped("feature store cannot be read", f"{path}: {error!r}") from error

    def _open(self) -> None:
        """Opens the file and checks that it is a store.

        Raises:
            OSError, SafetensorError, KeyError, ValueError: if it is none.
        """
        file = safe_open(self.path, "pt")
        metadata: dict[str, Any] = file.metadata() or {}
        keys = json.loads(metadata["keys"])
        self._rows = {key: row for row, key in enumerate(keys)}
        self._slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: rows.get_shape() for name, rows in self._slices.items()}
        widths = {shapes[part][-1] for part in PARTS if part in shapes}
        whole = all(shape[0] == len(keys) for shape in shapes.values())
        digested = all(f"{part}_digest" in shapes for part in PARTS if part in shapes)
        if metadata["jettclip_store"] != FORMAT or len(widths) != 1 or not whole or not digested:
            raise ValueError(f"not a store of format {FORMAT} with one width, a row a key, and digests: {shapes}")
        self.info = StoreInfo(
            model=metadata["model"],
            weights_digest=metadata["weights_digest"],
            logit_scale=float(metadata["logit_scale"]),
            normalized=metadata["normalized"] == "True",
            preprocess=metadata["preprocess"],
            width=widths.pop(),
        )

    def check(self, expected: StoreInfo) -> None:
        """Raises Dropped if the store is not of the expected teacher."""
        ours, theirs = asdict(self.info), asdict(expected)
        different = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        if different:
            raise Dropped(
                "feature store is of another teacher", f"{self.path}: {different} (here, in the other shards)"
            )

    def row(self, part: str, key: str, content: bytes | str) -> Tensor:
        """Returns the feature [D] of one sample's image, short or long caption.

        Args:
            part: ``image``, ``short`` or ``long``.
            key: sample key.
            content: the image bytes or caption text the sample has now, held against the stored digest.

        Raises:
            Dropped: if the store has no such row, or it was computed from another image or caption.
        """
        if key not in self._rows or part not in self._slices:
            raise Dropped(f"{part} feature is missing", self.path)
        row = self._rows[key]
        stored = bytes(self._slices[f"{part}_digest"][row].flatten()[:8].tolist())  # the first caption's
        if stored != digest(content):
            raise Dropped(f"{part} feature is stale, the {part} has changed since", self.path)
        feature: Tensor = self._slices[part][row][0]
        if not bool(torch.isfinite(feature).all()):
            raise Dropped(f"{part} feature is not finite", self.path)
        return feature


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
                f"{shard}, sample {key}: {problem}; extract the features of this shard again, "
                "or give --on-missing-features drop to go on without such samples"
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
                "extract them with scripts/extract_features.py, or check --features and --features-dir"
            )
        try:
            expected.append(Store(next(path for path in paths if os.path.exists(path))).info)
        except Dropped as problem:
            raise DataError(f"{problem}; extract it again") from problem
    if folder and len({os.path.basename(shard) for shard in shards}) < len(set(shards)):
        raise DataError(
            f"shards of the same name in several folders would share one store in --features-dir {folder}; "
            "leave the flag out and keep the stores beside their shards"
        )
    return StoreGroup(names, folder, expected, on_missing)
