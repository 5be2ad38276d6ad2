"""Turns the bytes of tar members into images, texts and vectors; nothing here ever unpickles or runs what it reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from jettclip.data.counts import Dropped, Tally

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # the MPO of a phone opens as a JPEG

MAX_CAPTION_BYTES = 100_000
"""A hundred times a long caption; what is longer is no caption, and would keep a loader busy."""

TURNED = "image is turned upright by its EXIF orientation"
"""What is noted of an image that is not taken as it is stored, but as its camera was held."""

MAX_JSON_BYTES = 2**22
"""Many times what describes a picture; decoded, JSON can take thirty times its size in memory."""

_UPRIGHT = {  # by the orientation that EXIF states; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, max_pixels: int, tally: Tally | None = None) -> Image.Image:
    """Decodes a whole image of one of `IMAGE_FORMATS` to RGB, upright as its EXIF data says.

    Args:
        data: the encoded image.
        max_pixels: the most that its header may announce.
        tally: where it is noted if pixels are not taken as they are stored.

    Raises:
        Dropped: if it cannot be decoded to the end, or is too large.
    """
    return load_image(open_image(data, max_pixels), tally)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header of an image; no pixel is decoded before `load_image`.

    Raises:
        Dropped: if it is none of `IMAGE_FORMATS`, or announces more than `max_pixels`.
    """
    if not data:
        raise Dropped("image is empty")
    with _dropping():
        try:
            image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:
            detail = f"{len(data)} bytes, which begin with {bytes(data[:24])!r}"
            raise Dropped("image cannot be decoded", detail) from error
    if image.width * image.height > max_pixels:
        raise Dropped("image has too many pixels", f"{image.width} x {image.height}")
    return image


def load_image(image: Image.Image, tally: Tally | None = None) -> Image.Image:
    """Decodes an opened image to RGB, and turns it upright.

    Colours are converted as OpenCLIP converts them, so that transparency is ignored; 16 bits are scaled to 8.

    Raises:
        Dropped: if it cannot be decoded to the end.
    """
    tally = tally or Tally()
    with _dropping():
        if image.format != "MPO" and getattr(image, "is_animated", False):
            tally.note("first of several frames is used")
        turn = turn_of(image, tally)
        if image.format == "TIFF":
            turn = None  # Pillow turns these itself
        if image.mode == "F":
            raise Dropped("image cannot be decoded", "its pixels are floats, of a range that it does not tell")
        if image.mode == "CMYK" or image.has_transparency_data:
            tally.note("CMYK image is converted" if image.mode == "CMYK" else "transparency is ignored")
        if image.mode.startswith("I"):  # Pillow would clip them at 255, not scale them
            tally.note("16-bit image is reduced to 8 bits")
            image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image, tally: Tally) -> Image.Transpose | None:
    """Returns what turns an opened image upright, and notes that it has to be turned."""
    try:
        with _dropping():
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Dropped:  # EXIF data is read for nothing else, and a picture is as good without
        tally.note("damaged EXIF data is ignored")
        return None
    if turn is not None:
        tally.note(TURNED)
    return turn


@contextmanager
def _dropping() -> Iterator[None]:
    """Turns whatever Pillow raises into Dropped, and keeps it from warning of large images and odd palettes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Dropped:
        raise
    except Image.DecompressionBombError as error:
        raise Dropped("image has too many pixels", str(error)) from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        raise Dropped("image cannot be decoded", str(error)) from error


def decode_text(data: bytes) -> str:
    """Decodes a caption.

    Raises:
        Dropped: if it is not UTF-8, empty, or absurdly long.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise Dropped("caption is absurdly long", f"{len(data)} bytes, of at most {MAX_CAPTION_BYTES}")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Dropped("caption is not UTF-8", str(error)) from error
    if not text:
        raise Dropped("caption is empty")
    return text


@lru_cache(maxsize=2)  # the parts of one sample ask for the same members, json and syn.json
def decode_json(data: bytes) -> dict[str, Any]:
    """Decodes a JSON object; the next call for the same bytes returns the same one, so that no one may change it.

    Raises:
        Dropped: if it is anything else, or longer than `MAX_JSON_BYTES`.
    """
    if len(data) > MAX_JSON_BYTES:
        raise Dropped("json is absurdly large", f"{len(data)} bytes, of at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Dropped("json cannot be decoded", str(error)) from error
    if not isinstance(value, dict):
        raise Dropped("json cannot be decoded", f"it holds a {type(value).__name__}, not an object")
    return value


def decode_vector(data: bytes) -> Tensor:
    """Decodes raw little-endian float32, as the LLM2CLIP notes store caption embeddings (arXiv 2411.04997).

    Returns:
        float32 [D].

    Raises:
        Dropped: if the bytes are not a whole number of finite float32.
    """
    if not data or len(data) % 4:
        raise Dropped("embedding is not raw float32", f"{len(data)} bytes")
    vector = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
    if not bool(torch.isfinite(vector).all()):
        raise Dropped("embedding is not finite")
    return vector
