"""Feature stores: what a teacher said of every sample of a shard, computed once and kept beside it.

A store is one safetensors file a shard, ``000012.<name>.safetensors`` for ``000012.tar``:

    image [N, A, D]   short [N, K, D]   long [N, K, D]     bfloat16, float16, float32 or int8; any may be absent
    image_digest [N, 8]   short_digest [N, K, 8]   long_digest [N, K, 8]     uint8
    image_check [N, A, 8]   short_check [N, K, 8]   long_check [N, K, 8]     uint8
    image_scale [N, A]   short_scale [N, K]   long_scale [N, K]     float32, only with int8 (`jettclip.data.quantize`)
    paug [bytes]   paug_end [N]   image_size [N, 2]     only with augmentations (`jettclip.data.augmentation_table`)

for N samples, A augmentations of the image (1 without reinforcement) and up to K captions, with the keys, the teacher
and its preprocessing in the metadata. A sample with fewer captions has zeros in place of the others. Rows are found by
key, never by position, and a caption's among the K by its digest; so a row tells whether its image or caption has
changed since, and by its check whether it is whole itself.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from jettclip.data.augmentation_table import AugmentationTable, Drawn, pack_augmentations
from jettclip.data.counts import DataError, Dropped
from jettclip.data.row_table import Digests, RowTable, decode_rows, digest, pack_rows
from jettclip.data.tar import stem_of
from jettclip.data.tensor_file import TensorFile, write_tensors
from jettclip.types import TeacherInfo

__all__ = ["FORMAT", "PARTS", "Store", "StoreInfo", "digest", "store_path", "write_store"]

FORMAT = "2"
PARTS = ("image", "short", "long")


@dataclass(frozen=True)
class StoreInfo:
    """What a store's metadata says of the model that filled it; stores of one name must agree on all of it."""

    model: str
    weights_digest: str
    logit_scale: float  # S = exp(logit_scale)
    normalized: bool
    preprocess: str  # JSON
    width: int
    augmentation: str = ""  # JSON of how the augmentations were drawn; empty for none
    members: str = ""  # JSON list of [name, width, S] of the models that stand side by side; empty for a single one

    def teachers(self, name: str) -> list[TeacherInfo]:
        """Returns the teachers whose features stand in a store of that name, as the loss must know them.

        Raises:
            ValueError: if `members` is not as documented.
        """
        if not self.members:
            return [TeacherInfo(name, self.width, self.logit_scale)]
        try:
            return [
                TeacherInfo(f"{name}/{member}", operator.index(width), float(logit_scale))
                for member, width, logit_scale in json.loads(self.members)
            ]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.members!r} does not list [name, width, logit scale]") from error


def store_path(shard: str, name: str, folder: str = "") -> str:
    """Returns where the store `name` of a shard lies: in `folder`, or beside the shard."""
    stem = stem_of(shard)
    return os.path.join(folder or os.path.dirname(stem), f"{os.path.basename(stem)}.{name}.safetensors")


def write_store(
    path: str | os.PathLike[str],
    keys: Sequence[str],
    features: Mapping[str, Tensor],
    digests: Mapping[str, Digests],
    info: StoreInfo,
    *,
    dtype: torch.dtype | None = None,
    augmentations: Sequence[str] | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> None:
    """Writes a store; the file appears only when it is whole, and can be read as a store.

    Args:
        path: file to write, as `store_path` names it.
        keys: sample keys, in the order of the rows.
        features: tensors ``image``, ``short``, ``long``, each [N, D] (one augmentation, one caption) or [N, A or K, D].
        digests: for each of them, one `digest` a row; or lists of the digests of a row's captions, up to K.
        info: the teacher.
        dtype: to store the features in: bfloat16, float16, float32, or int8, which quantises; as they are by default.
        augmentations: of each sample, a JSON list of those that the A features of its image were computed under.
        image_sizes: with them, height and width of each sample's image.

    Raises:
        DataError: if keys, rows and digests do not make a store, or it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for part, rows in features.items():
        tensors |= pack_rows(part, rows, digests[part], dtype)
    if augmentations is not None:
        tensors |= pack_augmentations(augmentations, image_sizes, tensors["image"].shape[1])
    metadata = {name: str(value) for name, value in asdict(info).items()}
    metadata |= {"jettclip_store": FORMAT, "keys": json.dumps(list(keys))}
    try:
        write_tensors(path, tensors, metadata, check=Store)
    except Dropped as problem:
        raise DataError(f"this makes no store: {problem}") from problem


class Store:
    """An open store of one shard; its features stay in the file until they are asked for.

    Raises:
        Dropped: if the file is missing, or is no store.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._open()
        except FileNotFoundError as error:
            raise Dropped("feature store is missing", path) from error
        except (OSError, KeyError, ValueError, RecursionError) as error:
            raise Dropped("feature store cannot be read", f"{path}: {error!r}") from error

    def _open(self) -> None:
        """Opens the file and checks that it is a store.

        Raises:
            Dropped, OSError, KeyError, ValueError, RecursionError: if it is none.
        """
        file = TensorFile(self.path)
        version = file.metadata["jettclip_store"]
        if version != FORMAT:
            raise ValueError(f"it has format {version[:20]!r}, and this version reads {FORMAT!r}; extract it again")
        self._rows = _numbered(file.metadata["keys"])
        self._tables = {part: RowTable(file, part, len(self._rows)) for part in PARTS if part in file.entries}
        kinds = {(table.dtype, table.width) for table in self._tables.values()}
        if len(kinds) != 1:
            raise ValueError(f"its parts should be of one number format and width, and are of {kinds}")
        self.dtype, width = kinds.pop()
        self.info = _info(file.metadata, width)
        self.augmentations = self._tables["image"].columns if "image" in self._tables else 1
        self._drawn = AugmentationTable(file, len(self._rows)) if "paug" in file.entries else None
        if bool(self.info.augmentation) != bool(self._drawn) or (self.augmentations > 1 and not self._drawn):
            raise ValueError(f"its {self.augmentations} augmentations are not described by metadata and paug alike")

    @property
    def keys(self) -> list[str]:
        """The keys of its samples, in the order of the rows."""
        return list(self._rows)

    @property
    def parts(self) -> set[str]:
        """What it has rows of: of ``image``, ``short`` and ``long``."""
        return set(self._tables)

    def check(self, expected: StoreInfo) -> None:
        """Raises Dropped if the store is not of the expected teacher."""
        ours, theirs = asdict(self.info), asdict(expected)
        different = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        if different:
            raise Dropped(
                "feature store is of another teacher", f"{self.path}: {different} (here, in the other shards)"
            )

    def find(self, part: str, key: str, wanted: bytes) -> tuple[int, int]:
        """Returns the row of a sample, and the column whose image or caption has the digest `wanted`.

        An image's digest is the same for all its augmentations, so its column is 0.

        Raises:
            Dropped: if there is no such row, or it was computed from another image or other captions.
        """
        return self.find_all(key, {part: wanted})[part]

    def find_all(self, key: str, wanted: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """Returns the row and column for each part whose digest is given, as `find` does, but faster."""
        row = self._rows.get(key)
        found = {}
        for part, its_digest in wanted.items():
            table = self._tables.get(part)
            if row is None or table is None:
                raise Dropped(f"{part} feature is missing", self.path)
            found[part] = row, table.find(row, its_digest)
        return found

    def read(self, part: str, row: int, column: int) -> Tensor:
        """Returns one feature [D] in the number format of the store, or float32 for int8.

        Raises:
            Dropped: if it is not finite, or cannot be read.
        """
        return self.read_all({part: (row, column)})[0]

    def read_all(self, places: Mapping[str, tuple[int, int]]) -> list[Tensor]:
        """Returns the features at the row and column given for each part, as `read` does, but faster."""
        tables = self._tables
        rows = [tables[part].fetch(*place) for part, place in places.items()]
        scales = []
        if self.dtype == torch.int8:
            scales = [tables[part].scale(*place) for part, place in places.items()]
        features = decode_rows(rows, self.dtype, scales)
        if features is None:
            if len(places) > 1:
                return [self.read(part, *place) for part, place in places.items()]  # one of them raises
            raise Dropped(f"{next(iter(places))} feature is not finite", self.path)
        return features

    def row(self, part: str, key: str, content: bytes | str) -> Tensor:
        """Returns the feature [D] of a sample's image (under its first augmentation), short or long caption.

        Args:
            part: ``image``, ``short`` or ``long``.
            key: sample key.
            content: the image bytes or caption text the sample has now, held against the stored digests.

        Raises:
            Dropped: if the store has no such row, or it was computed from another image or caption.
        """
        return self.read(part, *self.find(part, key, digest(content)))

    def drawn(self, row: int) -> Drawn | None:
        """Returns the augmentations under which the teacher saw an image; None in a store without.

        Raises:
            Dropped: if they cannot be read.
        """
        return self._drawn.row(row) if self._drawn else None


def _numbered(keys: str) -> dict[str, int]:
    """Returns the row of each of a store's keys, which are a JSON list."""
    listed = json.loads(keys)
    if not listed or not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise ValueError("its keys are no list of text")
    rows = {key: row for row, key in enumerate(listed)}
    if len(rows) < len(listed):
        raise ValueError(f"{len(listed) - len(rows)} of its {len(listed)} keys stand there twice")
    return rows


def _info(metadata: Mapping[str, str], width: int) -> StoreInfo:
    """Returns what the metadata say of the teacher, whose features have the given width."""
    info = StoreInfo(
        model=metadata["model"],
        weights_digest=metadata["weights_digest"],
        logit_scale=float(metadata["logit_scale"]),
        normalized=metadata["normalized"] == "True",
        preprocess=metadata["preprocess"],
        width=int(metadata["width"]),
        augmentation=metadata["augmentation"],
        members=metadata["members"],
    )
    teachers = info.teachers("")
    if not info.width == width == sum(teacher.width for teacher in teachers):
        raise ValueError(f"its features are {width} wide, and its metadata say {info.width} and {info.members!r}")
    if not all(math.isfinite(teacher.logit_scale) for teacher in teachers):
        raise ValueError("its logit scales are not finite")
    return info
