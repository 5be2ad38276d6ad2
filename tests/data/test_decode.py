from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from jettclip.data.counts import Dropped
from jettclip.data.decode import decode_image, decode_json, decode_vector
from support import picture

LIMIT = 10_000


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png_of(width: int, height: int) -> bytes:
    """Returns a PNG whose header announces a size; the pixels are not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def reason_of(data: bytes) -> str:
    with pytest.raises(Dropped) as dropped:
        decode_image(data, LIMIT)
    return dropped.value.reason


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(mode: str) -> None:
    gray = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (8, 1))
    if mode == "I;16":
        source = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        source = Image.fromarray(gray).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    image = decode_image(encoded(source, "JPEG" if mode == "CMYK" else "PNG"), LIMIT)
    assert (image.mode, image.size) == ("RGB", (16, 8))
    pixels = np.asarray(image).astype(int)
    if mode != "1":
        assert np.abs(pixels - gray[..., None]).max() <= (12 if mode == "CMYK" else 6)
    assert pixels[:, 0].max() <= 6
    assert pixels[:, -1].min() >= 249


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_allowed_formats_are_decoded_whatever_the_extension_says(format: str) -> None:
    assert decode_image(picture(0, format=format), LIMIT).size == (16, 16)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM", "EPS"])
def test_other_formats_are_refused(format: str) -> None:
    assert reason_of(picture(0, format=format)) == "image cannot be decoded"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0, 10, 0.6, 0.95])
def test_a_truncated_image_is_refused(format: str, keep: float) -> None:
    data = picture(0, size=64, format=format)
    assert reason_of(data[: int(keep if keep > 1 else keep * len(data))]) == "image cannot be decoded"


@pytest.mark.parametrize("size", [(101, 100), (20_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_announces_too_many_pixels_is_refused_without_a_warning(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(png_of(*size)) == "image has too many pixels"


def test_an_image_of_just_the_limit_is_decoded() -> None:
    assert decode_image(encoded(Image.new("RGB", (100, 100))), LIMIT).size == (100, 100)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"text"', b"\xff", b"[" * 100_000])
def test_json_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(Dropped, match="json cannot be decoded"):
        decode_json(data)


def test_a_vector_is_little_endian_float32() -> None:
    assert torch.equal(decode_vector(struct.pack("<3f", 1, -2.5, 3e-9)), torch.tensor([1, -2.5, 3e-9]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "embedding is not raw float32"),
        (b"12345", "embedding is not raw float32"),
        (struct.pack("<2f", 1, float("nan")), "embedding is not finite"),
        (struct.pack("<2f", 1, float("inf")), "embedding is not finite"),
    ],
)
def test_a_vector_of_other_bytes_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Dropped) as dropped:
        decode_vector(data)
    assert dropped.value.reason == reason
