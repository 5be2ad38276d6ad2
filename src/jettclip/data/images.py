"""Turns encoded images into the tensors of a batch: by Pillow, the reference, or several times faster.

The fast way decodes JPEGs by libjpeg-turbo straight into an array, and crops and resizes that by torch's antialiased
uint8 kernel, whose pixels differ from Pillow's by rounding only. It draws the same crop boxes. What it does not know,
of files or of transforms, goes by Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, PILToTensor

from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import decode_image, open_image, turn_of
from jettclip.data.tensor_transform import tensor_step, tensor_steps
from jettclip.seeding import seed_of, seeded

Pixels = Image.Image | Tensor
"""A decoded image: Pillow's, RGB, or uint8 [3, H, W] with the channels side by side in memory."""

_METADATA, _START_OF_SCAN = 0xE1, 0xDA  # second bytes of JPEG markers
_STARTS_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive; what else there is, Pillow decides on


class ImageReader:
    """Decodes images, and crops and resizes them.

    Args:
        transform: PIL image to tensor, random or not. The fast decoder recognises OpenCLIP's after
            `openclip.keep_uint8`, and torchvision's of the same steps; any other gets PIL images.
        decoder: ``fast``, or ``pillow`` for the reference.
        max_pixels: the most that an image's header may announce.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Tensor],
        *,
        decoder: str = "fast",
        max_pixels: int,
    ) -> None:
        self.max_pixels = max_pixels
        self._transform = transform
        self._steps = tensor_steps(transform) if decoder == "fast" else None

    def decode(self, data: bytes, tally: Tally) -> Pixels:
        """Decodes a whole image to a PIL image in RGB, or to uint8 [3, H, W] if the transform takes it so.

        Raises:
            Dropped: if it cannot be decoded to the end, or is too large; the same files for either decoder.
        """
        pixels = None if self._steps is None else _decode_jpeg(data, self.max_pixels)
        if pixels is None:
            image = decode_image(data, self.max_pixels, tally)
            if self._steps is None:
                return image
            pixels = np.array(image)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def transform(self, image: Pixels, place: str | None = None) -> Tensor:
        """Returns the transformed image [3, h, w], uint8 unless the transform makes floats of it.

        Args:
            image: what `decode` returned, or a PIL image.
            place: makes random choices a function of this text, the same for either decoder; without it they come from
                the global generators.
        """
        if isinstance(image, Tensor):
            assert self._steps is not None
            generator = torch.default_generator if place is None else torch.Generator().manual_seed(seed_of(place))
            for step in self._steps:
                image = step(image, generator)
            return image
        if place is None:
            return self._transform(image)
        with seeded(place):
            return self._transform(image)

    @property
    def size(self) -> tuple[int, int]:
        """What the transform makes of every image, height and width.

        Raises:
            ValueError: if it does not tell.
        """
        size = self._last("size")
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"the image transform does not tell the size that it makes: {self._transform}")
        return size[0], size[1]

    @property
    def interpolation(self) -> InterpolationMode:
        """How the transform resizes.

        Raises:
            ValueError: if it does not tell, or does so at random.
        """
        interpolation = self._last("interpolation")
        if not isinstance(interpolation, InterpolationMode):
            raise ValueError(f"the image transform does not tell how it resizes: {self._transform}")
        return interpolation

    @property
    def extra_steps(self) -> list[str]:
        """What the transform does beside cropping and resizing, such as changing colours."""
        steps = getattr(self._transform, "transforms", [self._transform])
        return [str(step) for step in steps if type(step) is not PILToTensor and tensor_step(step) is None]

    def _last(self, name: str) -> Any:
        """Returns what the last step of the transform that has it says."""
        steps = getattr(self._transform, "transforms", [self._transform])
        return next((getattr(step, name) for step in reversed(steps) if hasattr(step, name)), None)


def image_size(image: Pixels) -> tuple[int, int]:
    """Returns the height and width of a decoded image."""
    return (image.shape[1], image.shape[2]) if isinstance(image, Tensor) else (image.height, image.width)


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """Returns the pixels uint8 [H, W, 3] of a plain JPEG; None for whatever Pillow had better decide on."""
    try:
        return simplejpeg.decode_jpeg(data) if _is_plain(data, max_pixels) else None
    except (ValueError, IndexError, Dropped):  # the least irregularity
        return None


def _is_plain(data: bytes, max_pixels: int) -> bool:
    """Tells whether a JPEG is grey or of three colours, not too large, and has nothing to say about its orientation.

    Whether it is upright, Pillow looks, and only if it has EXIF data or XMP.

    Raises:
        IndexError, Dropped: if it is no JPEG with segments that follow one another.
    """
    place, is_plain, has_metadata = 2, False, False
    while data[place] == 0xFF and (kind := data[place + 1]) != _START_OF_SCAN:
        if kind == _METADATA:
            has_metadata = True
        elif kind in _STARTS_OF_FRAME:
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            is_plain = height * width <= max_pixels and data[place + 9] in (1, 3)
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    if not is_plain or data[place] != 0xFF:
        return False
    notes = Tally()
    if has_metadata:
        turn_of(open_image(data, max_pixels), notes)
    return not notes.noted
