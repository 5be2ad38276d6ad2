"""Makes the picture that a shard stores: the bytes as they are, if they may stay, or the picture encoded anew."""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple

from PIL import Image

from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import load_image, open_image, turn_of
from jettclip.prepare.settings import BuildSettings

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes may stay as they are, with the member's extension."""


class Picture(NamedTuple):
    """An encoded picture."""

    extension: str
    data: bytes
    width: int  # as stored: EXIF data may turn it
    height: int
    changed: bool


def store_picture(data: bytes, settings: BuildSettings) -> Picture:
    """Decodes a whole picture, and encodes it anew where its format, its size or ``--reencode`` asks for it.

    Encoded anew it is RGB, upright, and not larger than ``--max-side``; what was transparent shows the background.

    Raises:
        Dropped: if it cannot be decoded to the end, is too large, or is smaller than ``--min-side``.
    """
    image = open_image(data, settings.max_image_pixels)
    if min(image.size) < settings.min_side:
        raise Dropped("image is smaller than --min-side", f"{image.width} x {image.height}")
    pixels = load_image(image)
    shrinks = 0 < settings.max_side < max(image.size)
    if image.format in STORED and not shrinks and not settings.reencode:
        return Picture(STORED[image.format], data, *image.size, changed=False)
    if image.has_transparency_data and not image.mode.startswith("I"):
        pixels = _flatten(image, settings.background)
    if shrinks:
        scale = settings.max_side / max(pixels.size)
        size = max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale))
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)  # Pillow's filters are antialiased
    return Picture(settings.image_format, _encode(pixels, settings), *pixels.size, changed=True)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Lays a transparent picture on a colour, and turns it upright."""
    layers = Image.new("RGBA", image.size, background), image.convert("RGBA")
    flat = Image.alpha_composite(*layers).convert("RGB")
    turn = turn_of(image, Tally())
    return flat if turn is None else flat.transpose(turn)


def _encode(image: Image.Image, settings: BuildSettings) -> bytes:
    image.info.clear()  # no colour profile, no EXIF data: the pixels are what is trained on
    stream = BytesIO()
    try:
        if settings.image_format == "png":
            image.save(stream, "PNG")
        else:
            image.save(stream, "JPEG" if settings.image_format == "jpg" else "WEBP", quality=settings.quality)
    except (OSError, ValueError) as error:  # more pixels a side than the format can say
        raise Dropped("image cannot be encoded", str(error)) from error
    return stream.getvalue()
