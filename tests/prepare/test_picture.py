from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jettclip.data.counts import Dropped
from jettclip.prepare.picture import store_picture
from jettclip.prepare.settings import BuildSettings


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def stored(data: bytes, **changes: Any) -> tuple[str, Image.Image, bool]:
    """Returns extension, decoded picture and whether the bytes stayed."""
    picture = store_picture(data, BuildSettings("a.csv", "out", **changes))
    image = Image.open(io.BytesIO(picture.data))
    assert image.size == (picture.width, picture.height)
    assert picture.changed == (picture.data != data)
    return picture.extension, image, not picture.changed


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_bytes_stay_as_they_are_where_they_may(format: str, extension: str) -> None:
    data = encoded(smooth(30, 20), format)
    assert stored(data, max_side=30, image_format="webp")[::2] == (extension, True)
    assert stored(data, reencode=True, quality=80)[::2] == ("jpg", False)


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp"])
def test_other_formats_are_encoded_anew(format: str, target: str) -> None:
    extension, image, stays = stored(encoded(smooth(30, 20), format), image_format=target)
    assert (extension, image.format, stays) == (target, {"jpg": "JPEG"}.get(target, target.upper()), False)
    difference = np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(smooth(30, 20), float))
    assert difference.mean() < 6  # GIF has 256 colours


def test_a_large_picture_is_shrunk_with_antialiasing_and_a_small_one_never_enlarged() -> None:
    noise = np.random.default_rng(0).choice([0, 255], (64, 256, 1)).repeat(3, 2).astype(np.uint8)
    _, image, _ = stored(encoded(Image.fromarray(noise), "PNG"), max_side=64, image_format="png")
    assert image.size == (64, 16)
    assert np.asarray(image).std() < 64  # the mean of 4 x 4 pixels, where every fourth pixel alone would have 127
    assert stored(encoded(smooth(30, 20), "PNG"), max_side=64, reencode=True)[1].size == (30, 20)
    assert stored(encoded(smooth(300, 1), "PNG"), max_side=64)[1].size == (64, 1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_the_background(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    options: dict[str, Any] = {}
    image = picture.convert(mode)
    if mode == "P":
        image, options = Image.new("P", (8, 8), 0), {"transparency": 0}
    data = encoded(image, "PNG", **options)
    assert stored(data, reencode=True, image_format="png")[1].getpixel((4, 4)) == (255, 255, 255)
    green = stored(data, reencode=True, image_format="png", background="#00ff00")[1]
    assert green.getpixel((4, 4)) == (0, 255, 0)
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    mixed = stored(encoded(half, "PNG"), reencode=True, image_format="png", background="black")[1]
    assert mixed.getpixel((4, 4)) == (128, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pictures_that_are_encoded_anew_are_upright_and_tell_no_orientation(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    data = encoded(smooth(30, 20).convert(mode), "PNG", exif=exif)
    assert stored(data)[1].size == (30, 20)
    _, image, _ = stored(data, reencode=True, image_format="png")
    assert image.size == (20, 30)
    assert not image.getexif()
    assert np.array_equal(np.asarray(image), np.rot90(np.asarray(smooth(30, 20)), -1))


@pytest.mark.parametrize("mode", ["CMYK", "L", "I;16", "1"])
def test_any_kind_of_colour_becomes_rgb(mode: str) -> None:
    format = "TIFF"
    gray = np.full((8, 8), 200 * 256, np.uint16)
    image = Image.fromarray(gray) if mode == "I;16" else Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode)
    _, out, _ = stored(encoded(image, format), image_format="png")
    assert out.mode == "RGB"
    if mode != "1":
        assert out.getpixel((4, 4)) == (200, 200, 200)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_decoded_to_its_end(format: str, keep: bool) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    with pytest.raises(Dropped, match="image cannot be decoded"):
        stored(data[: len(data) * 9 // 10], reencode=not keep)


def test_pictures_that_are_too_small_or_too_large_are_dropped() -> None:
    data = encoded(smooth(30, 20), "PNG")
    assert stored(data, min_side=20, max_image_pixels=600)[2]
    with pytest.raises(Dropped, match="image is smaller than --min-side: 30 x 20"):
        stored(data, min_side=21)
    with pytest.raises(Dropped, match="image has too many pixels: 30 x 20"):
        stored(data, max_image_pixels=599)


def test_a_picture_that_its_format_cannot_hold_is_dropped() -> None:
    data = encoded(Image.new("RGB", (16_400, 1)), "PNG")  # WebP holds 16383 pixels a side
    with pytest.raises(Dropped, match="image cannot be encoded"):
        stored(data, reencode=True, image_format="webp")


def test_only_what_is_a_colour_is_a_background(tmp_path: Path) -> None:
    (problem,) = BuildSettings("a.csv", "out", background="whit").problems()
    assert "--background 'whit' is no colour" in problem
