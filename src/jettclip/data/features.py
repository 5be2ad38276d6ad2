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

from jettclip.data.counts import Dropped

FORMAT = "1"
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

    @property
    def parts(self) -> set[str]:
        """What it has rows of: of ``image``, ``short`` and ``long``."""
        return {part for part in PARTS if part in self._slices}

    @property
    def dtype(self) -> torch.dtype:
        """What its features are stored in."""
        rows: Tensor = self._slices[next(iter(self.parts))][:0]
        return rows.dtype

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
