"""Stored augmentation: the crop and colour operations under which a teacher saw an image, drawn once and replayed.

A teacher's image feature belongs to one view of the image, so a student that is to learn from it must see the same view
(dataset reinforcement, arXiv 2303.08983 and 2311.17049). The stored form is that of DataCompDR's ``paug.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as F

from jettclip.data.counts import Dropped

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""RandAugment's operations; a stored augmentation names one by its index here."""

_LIMITS = {"Shear": 1.0, "Translate": 2.0**15, "Rotate": 360.0}  # what an operation's magnitude may be, up or down
_RANGES = {"Posterize": (1.0, 8.0), "Solarize": (0.0, 256.0)}
_FACTORS = (-1.0, 10.0)  # Brightness and the like: 1 more is what the image is blended by
_BINS = 31
_MOST_BYTES = 2**20
_MOST_OPERATIONS = 16
_LARGEST_SIDE = 2**20
_UNREADABLE = "stored augmentation cannot be read"
_OTHER_SIZE = "image is of another size than its stored augmentation was drawn for"
_REACH = ((30, 0.9), (10, 0.75), (5, 0.5))
"""So many boxes drawn for an image practically always reach past such a part of it."""


class Augmentation(NamedTuple):
    """A random resized crop, and the operations of RandAugment after it (arXiv 1909.13719), in the order of use."""

    box: tuple[int, int, int, int]  # top, left, height, width in pixels of the source image
    operations: tuple[tuple[int, float] | None, ...]  # index and magnitude; None for one that was skipped


class StoredAugmentation(NamedTuple):
    """One of the stored augmentations of a sample, with what tells whether the image is still of the same size."""

    augmentation: Augmentation
    drawn_for: tuple[int, int] | None  # height and width of the image at generation, where that was stored
    extent: tuple[int, int]  # how far the boxes of all the sample's augmentations reach
    count: int  # type: ignore[assignment]  # of augmentations that the sample has; hides tuple.count

    def check(self, size: tuple[int, int]) -> None:
        """Raises Dropped if an image of height and width `size` is not of the size it had at generation.

        Where that size was not stored, as in DataCompDR, the boxes tell: one that reaches beyond the image was drawn
        for a larger one; and if none comes near the far edge, they were drawn for a smaller one. Images as they should
        be are dropped in fewer than one of 10,000 cases. Only a direction that is not much the longer one counts,
        since the boxes, nearly square, reach less far there.
        """
        if self.drawn_for is not None:
            if self.drawn_for != size:
                raise Dropped(_OTHER_SIZE, f"{size[0]} x {size[1]} and {self.drawn_for[0]} x {self.drawn_for[1]}")
            return
        part = next((part for count, part in _REACH if self.count >= count), 0.0)
        for length, other, reach in zip(size, size[::-1], self.extent, strict=True):
            if reach > length or (length <= other * 4 / 3 and reach <= length * part):
                raise Dropped(
                    _OTHER_SIZE, f"it is {size[0]} x {size[1]}, and {self.count} boxes reach to {self.extent}"
                )


def select(
    augmentations: Sequence[Augmentation], index: int, drawn_for: tuple[int, int] | None = None
) -> StoredAugmentation:
    """Returns one of a sample's augmentations, with what its check needs of all of them."""
    boxes = [one.box for one in augmentations]
    extent = max(top + height for top, _, height, _ in boxes), max(left + width for _, left, _, width in boxes)
    return StoredAugmentation(augmentations[index], drawn_for, extent, len(augmentations))


def draw(
    size: tuple[int, int],
    generator: Random,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    operations: int = 2,
    magnitude: int = 9,
    crop_size: tuple[int, int] = (224, 224),
) -> Augmentation:
    """Draws an augmentation by the rules of torchvision's RandomResizedCrop and RandAugment.

    Args:
        size: height and width of the image.
        generator: what the draw is a function of.
        scale: smallest and largest part of the image's area.
        ratio: smallest and largest ratio of width to height.
        operations: how many of RandAugment's operations come after the crop.
        magnitude: their strength, of 31 steps from 0.
        crop_size: height and width the crop is resized to, which translations are a part of.
    """
    space = _magnitudes(magnitude, crop_size)
    box = _draw_box(size, generator, scale, ratio)
    drawn = []
    for _ in range(operations):
        index = generator.randrange(len(OPERATIONS))
        strength, signed = space[index]
        drawn.append((index, -strength if signed and generator.randrange(2) else strength))
    return Augmentation(box, tuple(drawn))


@lru_cache(maxsize=16)
def _magnitudes(magnitude: int, crop_size: tuple[int, int]) -> list[tuple[float, bool]]:
    """Returns the strength that torchvision gives each operation, and whether it has a random sign."""
    space = RandAugment()._augmentation_space(_BINS, crop_size)
    return [
        (float(strengths[magnitude]) if strengths.ndim else 0.0, signed)
        for strengths, signed in (space[name] for name in OPERATIONS)
    ]


def _draw_box(
    size: tuple[int, int], generator: Random, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    height, width = size
    for _ in range(10):  # as often as torchvision tries
        area = height * width * generator.uniform(*scale)
        shape = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < w <= width and 0 < h <= height:
            return generator.randrange(height - h + 1), generator.randrange(width - w + 1), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def dump(augmentations: Sequence[Augmentation]) -> str:
    """Writes augmentations as DataCompDR does, ``[[[top, left, height, width], [[index, magnitude], ...]], ...]``."""
    return json.dumps([[one.box, one.operations] for one in augmentations], separators=(",", ":"))


def parse(text: str | bytes) -> list[Augmentation]:
    """Reads the augmentations of a sample.

    Args:
        text: JSON, what `dump` writes or ``{"param_aug": ...}`` of that, as a list or a string once more.

    Raises:
        Dropped: if it is anything else, or has none.
    """
    try:
        value = _load(text)
        if isinstance(value, dict):
            value = value["param_aug"]
        if isinstance(value, str):
            value = _load(value)
        if not isinstance(value, list) or not value:
            raise ValueError(f"expected a list of augmentations, not {str(value)[:40]!r}")
        return [_augmentation(one) for one in value]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise Dropped(_UNREADABLE, repr(error)) from error


def _load(text: str | bytes) -> Any:
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{len(text)} bytes are more than {_MOST_BYTES}")
    return json.loads(text)


def _augmentation(value: Any) -> Augmentation:
    """Reads one augmentation; one without operations is the crop alone, or null for operations that were skipped."""
    box, *rest = value
    top, left, height, width = box
    if any(type(number) is not int for number in box):
        raise TypeError(f"box {box} is not of whole pixels")
    if not (0 <= top < _LARGEST_SIDE and 0 <= left < _LARGEST_SIDE):
        raise ValueError(f"box {box} does not start inside an image")
    if not (0 < height < _LARGEST_SIDE and 0 < width < _LARGEST_SIDE):
        raise ValueError(f"box {box} has no size that an image may have")
    operations = rest[0] if rest else None
    if len(rest) > 1 or not isinstance(operations, list | None) or len(operations or ()) > _MOST_OPERATIONS:
        raise ValueError(f"expected a box and at most {_MOST_OPERATIONS} operations, not {str(value)[:80]}")
    return Augmentation((top, left, height, width), tuple(_operation(one) for one in operations or ()))


def _operation(value: Any) -> tuple[int, float] | None:
    if value is None:
        return None
    index, magnitude = value
    if type(index) is not int or not 0 <= index < len(OPERATIONS):
        raise ValueError(f"operation {index!r} is none of 0 to {len(OPERATIONS) - 1}")
    if type(magnitude) not in (int, float):
        raise TypeError(f"magnitude {magnitude!r} of an operation is no number")
    low, high = _bounds()[index]
    if not low <= magnitude <= high:  # NaN is not, either
        raise ValueError(f"{OPERATIONS[index]} of {magnitude} is not in {low:g} to {high:g}")
    return index, float(magnitude)


@lru_cache(maxsize=1)
def _bounds() -> list[tuple[float, float]]:
    """Returns what each operation's magnitude may be, for torchvision to apply it."""
    found = []
    for name in OPERATIONS:
        limit = _LIMITS.get(name.rstrip("XY"))
        found.append(_RANGES.get(name, _FACTORS) if limit is None else (-limit, limit))
    return found


def replay(
    image: Image.Image | Tensor, augmentation: Augmentation, size: tuple[int, int], interpolation: InterpolationMode
) -> Tensor:
    """Shows an image as the teacher saw it, by torchvision's own functions.

    The operations are Pillow's for tensors too: they are those that DataCompDR was made with, and several times faster.

    Args:
        image: PIL RGB, or uint8 [3, H, W].
        augmentation: what to do to it; its box must lie inside.
        size: height and width (h, w) of the result.
        interpolation: bicubic or bilinear, antialiased.

    Returns:
        uint8 [3, h, w].
    """
    crop = F.resized_crop(image, *augmentation.box, list(size), interpolation, antialias=True)
    operations = [one for one in augmentation.operations if one is not None]
    if operations:
        crop = crop if isinstance(crop, Image.Image) else F.to_pil_image(crop)
        for index, magnitude in operations:
            crop = _apply_op(crop, OPERATIONS[index], magnitude, InterpolationMode.NEAREST, None)
    return F.pil_to_tensor(crop) if isinstance(crop, Image.Image) else crop
