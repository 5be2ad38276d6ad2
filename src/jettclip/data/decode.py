"""Turns the bytes of tar members into images, texts and vectors; nothing here ever unpickles or runs what it reads."""

from __future__ import annotations

import json
import warnings
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jettclip.data.counts import Dropped

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decodes a whole JPEG, PNG or WebP image to RGB.

    Raises:
        Dropped: if it cannot be decoded to the end, or its header announces more than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd palettes; the limit here is ours
            image = Image.open(BytesIO(data), formats=_IMAGE_FORMATS)
            if image.width * image.height <= max_pixels:
                return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise Dropped("image has too many pixels", str(error)) from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        raise Dropped("image cannot be decoded", str(error)) from error
    raise Dropped("image has too many pixels", f"{image.width} x {image.height}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray: Pillow would clip them at 255, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode_text(data: bytes) -> str:
    """Decodes a caption.

    Raises:
        Dropped: if it is not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Dropped("caption is not UTF-8", str(error)) from error
    if not text:
        raise Dropped("caption is empty")
    return text


def decode_json(data: bytes) -> dict[str, Any]:
    """Decodes a JSON object.

    Raises:
        Dropped: if it is anything else.
    """
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
