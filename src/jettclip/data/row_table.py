"""One part of a feature store: the features of all its images, short captions or long captions, with their digests.

    <part> [N, C, D]   <part>_digest [N, C, 8], or [N, 8] for images   <part>_check [N, C, 8]
    <part>_scale [N, C], for int8 only

C stands for the augmentations of an image, or the most captions of a sample. ``_digest`` tells what a feature was
computed from, and ``_check`` whether its own bytes, and its scale, are still what was written and finite. The features
stay in the file until they are asked for; the rest is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from jettclip.data.counts import DataError, Dropped
from jettclip.data.quantize import dequantize, quantize
from jettclip.data.tensor_file import TensorFile

DIGEST_SIZE = 8
NOT_FINITE = bytes(DIGEST_SIZE)
"""The check of a feature that was not finite when it was written."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
"""What features may be stored in."""

Digests = Sequence[bytes] | Sequence[Sequence[bytes]]
"""What features were computed from: a `digest` a row, or those of a row's captions."""


def digest(content: bytes | str) -> bytes:
    """Returns the 8 bytes that a store keeps of an image's bytes or a caption's text: XXH3, at 40 GB a second."""
    return xxhash.xxh3_64_digest(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


class RowTable:
    """The features of one part of an open store.

    Args:
        file: the store.
        part: ``image``, ``short`` or ``long``.
        rows: samples that it must have.

    Raises:
        Dropped: if the file cannot be read.
        KeyError, ValueError: if the part is not there as documented.
    """

    def __init__(self, file: TensorFile, part: str, rows: int) -> None:
        self.part, self._file = part, file
        self.dtype, shape, self._start, _ = file.entries[part]
        if self.dtype not in DTYPES or len(shape) != 3 or shape[0] != rows or 0 in shape[1:]:
            raise ValueError(f"{rows} rows of {part} features are needed, not {self.dtype} of shape {shape}")
        _, self.columns, self.width = shape
        self._size = self.width * self.dtype.itemsize
        digests_shape = _digests_shape(part, rows, self.columns)
        self._digests = file.load(f"{part}_digest", torch.uint8, digests_shape)
        self._digests_size = math.prod(digests_shape[1:])
        self._checks = file.load(f"{part}_check", torch.uint8, (rows, self.columns, DIGEST_SIZE))
        self._seeds: Sequence[int] | None = None
        if self.dtype == torch.int8:
            scales = memoryview(file.load(f"{part}_scale", torch.float32, (rows, self.columns)))
            self._scales, self._seeds = scales.cast("f"), scales.cast("I")

    def find(self, row: int, wanted: bytes) -> int:
        """Returns the column of a row whose image or caption has the digest `wanted`.

        An image's digest is the same for all its augmentations, so its column is 0.

        Raises:
            Dropped: if there is none, since the image or the captions have changed.
        """
        size = self._digests_size
        place = self._digests.find(wanted, row * size, row * size + size) - row * size
        if place < 0 or place % DIGEST_SIZE:  # not found, or across two digests
            raise Dropped(f"{self.part} feature is stale, the {self.part} has changed since", self._file.path)
        return place // DIGEST_SIZE

    def fetch(self, row: int, column: int) -> bytes:
        """Returns the bytes of one feature.

        Raises:
            Dropped: if it is not there, cannot be read, is not what was written, or was not finite then.
        """
        if not 0 <= column < self.columns:
            raise Dropped(f"{self.part} feature is missing", f"{self._file.path}: number {column} of {self.columns}")
        place = row * self.columns + column
        data = self._file.read(self._start + place * self._size, self._size)
        seed = self._seeds[place] if self._seeds else 0
        if not self._checks.startswith(xxhash.xxh3_64_digest(data, seed), place * DIGEST_SIZE):
            finite = self._checks[place * DIGEST_SIZE : (place + 1) * DIGEST_SIZE] != NOT_FINITE
            raise Dropped(f"{self.part} feature is {'damaged' if finite else 'not finite'}", self._file.path)
        return data

    def scale(self, row: int, column: int) -> float:
        """Returns the unit of one int8 feature."""
        return self._scales[row * self.columns + column]


def decode_rows(rows: Sequence[bytes], dtype: torch.dtype, scales: Sequence[float] = ()) -> list[Tensor] | None:
    """Returns features [D] from their bytes, or None if the scale of one is none that is written.

    All features of a sample are decoded at once, since the calls to libraries cost more than the work they do.

    Args:
        rows: the bytes of each, all of one length.
        dtype: what they are stored in; int8 becomes float32.
        scales: the unit of each, for int8.
    """
    if dtype == torch.int8:
        return dequantize(rows, scales)
    data, size = bytearray().join(rows), len(rows[0])
    width = size // dtype.itemsize
    return [torch.frombuffer(data, dtype=dtype, count=width, offset=index * size) for index in range(len(rows))]


def pack_rows(part: str, features: Tensor, digests: Digests, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Returns the tensors of a `RowTable`.

    Args:
        part: ``image``, ``short`` or ``long``.
        features: [N, D] (one augmentation, one caption) or [N, C, D].
        digests: for each of N rows one digest, or up to C of captions.
        dtype: to store the features in, of `DTYPES`; as they are for None.

    Raises:
        DataError: if a row has more digests than features.
    """
    features = features if features.ndim == 3 else features.unsqueeze(1)
    shape = _digests_shape(part, len(digests), features.shape[1])
    size = math.prod(shape[1:])
    rows = [row if isinstance(row, bytes) else b"".join(row) for row in digests]
    if any(len(row) > size for row in rows):
        raise DataError(f"more digests than {part} features, of which every sample has {features.shape[1]}")
    table = np.frombuffer(b"".join(row.ljust(size, b"\0") for row in rows), np.uint8)
    packed = {f"{part}_digest": torch.from_numpy(table.reshape(shape).copy())}
    if dtype == torch.int8:
        packed[part], packed[f"{part}_scale"] = quantize(features)
    else:
        packed[part] = features.to(dtype or features.dtype)
    packed[f"{part}_check"] = _checks_of(packed[part], packed.get(f"{part}_scale"))
    return packed


def _checks_of(features: Tensor, scales: Tensor | None) -> Tensor:
    """Returns the check of every row, uint8 [N, C, 8]: a digest of its bytes, seeded by the bits of its scale if any.

    A row that is not finite has zeros: that is seen here, once, since it would take a quarter of the time of reading.
    """
    finite = (features.isfinite().all(dim=-1) if scales is None else scales.isfinite()).flatten().tolist()
    seeds = [0] * len(finite) if scales is None else scales.flatten().numpy().view(np.uint32).tolist()
    rows = features.contiguous().view(torch.uint8).flatten(0, 1).numpy()
    checks = [
        xxhash.xxh3_64_digest(row.data, seed) if is_finite else NOT_FINITE
        for row, seed, is_finite in zip(rows, seeds, finite, strict=True)
    ]
    return torch.frombuffer(bytearray(b"".join(checks)), dtype=torch.uint8).view(*features.shape[:2], DIGEST_SIZE)


def _digests_shape(part: str, rows: int, columns: int) -> tuple[int, ...]:
    return (rows, DIGEST_SIZE) if part == "image" else (rows, columns, DIGEST_SIZE)
