from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import MAX_JSON_BYTES, decode_image, decode_json, decode_vector
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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_allowed_formats_are_decoded_whatever_the_extension_says(format: str) -> None:
    assert decode_image(picture(0, format=format), LIMIT).size == (16, 16)


@pytest.mark.parametrize("format", ["PPM", "EPS", "ICO", "PDF", "TGA"])
def test_other_formats_are_refused(format: str) -> None:
    assert reason_of(picture(0, format=format)) == "image cannot be decoded"


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>404</html>", b"not found", b"\0" * 100, b"\xff\xd8\xff"])
def test_what_is_no_image_is_dropped_with_its_first_bytes(data: bytes) -> None:
    with pytest.raises(Dropped) as dropped:
        decode_image(data, LIMIT)
    assert dropped.value.reason == "image cannot be decoded"
    assert f"{len(data)} bytes, which begin with {data[:24]!r}" in str(dropped.value)


def test_a_member_without_bytes_has_a_reason_of_its_own() -> None:
    assert reason_of(b"") == "image is empty"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("keep", [10, 0.6, 0.95])
def test_a_truncated_image_is_refused(format: str, keep: float) -> None:
    data = picture(0, size=64, format=format)
    assert reason_of(data[: int(keep if keep > 1 else keep * len(data))]) == "image cannot be decoded"


@pytest.mark.parametrize("size", [(101, 100), (20_000, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_announces_too_many_pixels_is_refused_without_a_warning(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(png_of(*size)) == "image has too many pixels"


def test_an_image_of_just_the_limit_is_decoded() -> None:
    assert decode_image(encoded(Image.new("RGB", (100, 100))), LIMIT).size == (100, 100)


NOTES = {
    "L": [],
    "RGB": [],
    "RGBA": ["transparency is ignored"],
    "LA": ["transparency is ignored"],
    "I;16": ["16-bit image is reduced to 8 bits"],
    "CMYK": ["CMYK image is converted"],
}


def notes_of(data: bytes) -> list[str]:
    tally = Tally()
    image = decode_image(data, LIMIT, tally)
    assert image.mode == "RGB"
    assert set(tally.noted.values()) <= {1}
    return list(tally.noted)


@pytest.mark.parametrize("mode", NOTES)
def test_what_is_not_taken_as_it_is_stored_is_noted(mode: str) -> None:
    assert notes_of(encoded(Image.new(mode, (9, 7)), "TIFF")) == NOTES[mode]


def test_a_transparent_palette_is_noted() -> None:
    image = Image.new("P", (9, 7))
    image.putpalette([10, 20, 30, 40, 50, 60])
    data = encoded(image, "PNG", transparency=0)
    assert notes_of(data) == ["transparency is ignored"]
    assert decode_image(data, LIMIT).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_decoded(format: str) -> None:
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data, LIMIT).getpixel((4, 4)) == (255, 0, 0)
    assert notes_of(data) == ["first of several frames is used"]


def test_the_second_image_behind_a_phones_is_no_animation() -> None:
    data = encoded(Image.new("RGB", (9, 7), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 7))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode_image(data, LIMIT).size == (9, 7)
    assert notes_of(data) == []


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_exif_data_says(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (16, 8))
    image.paste("white", (8, 0, 16, 8))
    data = encoded(image, format, exif=exif)
    upright = decode_image(data, LIMIT)
    assert upright.size == (8, 16)
    assert (upright.getpixel((4, 2)), upright.getpixel((4, 14))) == ((0, 0, 0), (255, 255, 255))
    assert notes_of(data) == ["image is turned upright by its EXIF orientation"]


def test_damaged_exif_data_costs_no_image() -> None:
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n  2\nno hex")
    assert notes_of(encoded(Image.new("RGB", (9, 7)), pnginfo=info)) == ["damaged EXIF data is ignored"]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (255, 0), (256, 1), (65535, 255), (2**31 - 1, 255), (-5, 0)])
def test_integers_are_scaled_from_16_bits(value: int, expected: int) -> None:
    assert decode_image(encoded(Image.new("I", (9, 7), value), "TIFF"), LIMIT).getpixel((0, 0)) == (expected,) * 3


def test_floats_of_an_unknown_range_are_refused() -> None:
    assert reason_of(encoded(Image.new("F", (9, 7)), "TIFF")) == "image cannot be decoded"


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


def test_json_is_decoded_once_for_all_who_ask_and_not_if_it_is_too_large() -> None:
    data = b'{"a": "' + b"x" * (MAX_JSON_BYTES - 9) + b'"}'
    assert decode_json(data) is decode_json(data)
    with pytest.raises(Dropped, match=r"json is absurdly large: 4194305 bytes, of at most 4194304"):
        decode_json(data + b" ")
