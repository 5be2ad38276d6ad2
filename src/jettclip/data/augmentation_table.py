"""The part of a feature store that says how each image was cropped and coloured before the teacher saw it.

    paug [bytes]   paug_end [N]   image_size [N, 2]     uint8, int64 and int32

``paug`` is one JSON list a sample, one after the other: DataCompDR's form (arXiv 2311.17049), with each augmentation on
a line of its own, so that reading one of thirty takes no parser through all of them. ``paug_end`` is where each list
ends, and ``image_size`` the height and width of the image for which they were drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jettclip.data.augmentation import StoredAugmentation, parse
from jettclip.data.counts import DataError, Dropped
from jettclip.data.tensor_file import TensorFile

_LINE_BREAK = b",\n"


class Drawn(NamedTuple):
    """The augmentations under which a teacher saw one image; those of several teachers must be equal."""

    size: tuple[int, int]  # height and width of the image
    lines: bytes  # JSON, one augmentation a line

    def choose(self, which: int, count: int) -> StoredAugmentation:
        """Returns one of the `count` augmentations.

        Raises:
            Dropped: if there are not so many, or it cannot be parsed, or lies outside the image.
        """
        lines = self.lines[1:-1].split(_LINE_BREAK)
        found = parse(b"[%b]" % lines[which]) if len(lines) == count else []
        if len(found) != 1:
            raise Dropped("stored augmentation cannot be read", f"{len(lines)} lines for {count} augmentations")
        top, left, height, width = found[0].box
        if top + height > self.size[0] or left + width > self.size[1]:
            raise Dropped("stored augmentation cannot be read", f"{found[0].box} lies outside an image of {self.size}")
        return StoredAugmentation(found[0], drawn_for=self.size, extent=self.size, count=count)


class AugmentationTable:
    """The augmentations of all samples of a store; only where they end is in memory.

    Raises:
        Dropped: if the file cannot be read.
        KeyError, ValueError: if it does not hold the augmentations of so many samples.
    """

    def __init__(self, file: TensorFile, samples: int) -> None:
        blob = file.entries["paug"]
        ends = np.frombuffer(file.load("paug_end", torch.int64, (samples,)), np.int64)
        sizes = np.frombuffer(file.load("image_size", torch.int32, (samples, 2)), np.int32)
        starts = np.concatenate([[0], ends[:-1]])
        if blob.dtype != torch.uint8 or not ((starts >= 0) & (starts <= ends) & (ends <= blob.size)).all():
            raise ValueError("its paug_end does not divide its paug into samples")
        if not (sizes > 0).all():
            raise ValueError("its image_size is not positive")
        self._file, self._start, self._ends, self._sizes = file, blob.start, ends, sizes.reshape(samples, 2)

    def row(self, row: int) -> Drawn:
        """Returns the augmentations of one sample.

        Raises:
            Dropped: if they cannot be read.
        """
        start = int(self._ends[row - 1]) if row else 0
        height, width = self._sizes[row].tolist()
        return Drawn((height, width), self._file.read(self._start + start, int(self._ends[row]) - start))


def pack_augmentations(
    augmentations: Sequence[str], image_sizes: Sequence[tuple[int, int]], count: int
) -> dict[str, Tensor]:
    """Returns the tensors of an `AugmentationTable`.

    Args:
        augmentations: a JSON list for each sample.
        image_sizes: height and width of each sample's image.
        count: augmentations that each sample must have.

    Raises:
        DataError: if a sample has another number.
    """
    blobs = []
    for text in augmentations:
        drawn = json.loads(text)
        if len(drawn) != count:
            raise DataError(f"{len(drawn)} augmentations for {count} image features: {text[:200]}")
        lines = [json.dumps(one, separators=(",", ":")).encode() for one in drawn]
        blobs.append(b"[%b]" % _LINE_BREAK.join(lines))
    return {
        "paug": torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8),
        "paug_end": torch.tensor([len(blob) for blob in blobs], dtype=torch.int64).cumsum(0),
        "image_size": torch.tensor(image_sizes, dtype=torch.int32).reshape(len(image_sizes), 2),
    }
