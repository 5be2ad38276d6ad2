from __future__ import annotations

import io
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, InterpolationMode, PILToTensor, RandomResizedCrop, Resize

from jettclip.data.counts import Dropped, Tally
from jettclip.data.images import ImageReader, image_size
from jettclip.openclip import keep_uint8

Transform = Callable[..., Tensor]


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def photograph(width: int, height: int, noise: float = 6, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    smooth = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(smooth) + draw.normal(0, noise, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def transform_of(is_train: bool, size: int | tuple[int, int] = 64, **options: Any) -> Transform:
    scale = AugmentationCfg(scale=options.pop("scale", (0.9, 1.0)))
    return keep_uint8(image_transform_v2(PreprocessCfg(size=size, **options), is_train, scale if is_train else None))


def readers(transform: Transform, max_pixels: int = 10**7) -> tuple[ImageReader, ImageReader]:
    return ImageReader(transform, max_pixels=max_pixels), ImageReader(
        transform, decoder="pillow", max_pixels=max_pixels
    )


def psnr(one: Tensor, other: Tensor) -> float:
    error = float((one.float() - other.float()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def outcome(reader: ImageReader, data: bytes) -> tuple[Any, dict[str, int]]:
    """Returns the pixels [H, W, 3], as shape and bytes, or why there are none; and what was noted."""
    tally = Tally()
    try:
        image = reader.decode(data, tally)
    except Dropped as problem:
        return problem.reason, dict(tally.noted)
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.array(image)
    return (pixels.shape, pixels.tobytes()), dict(tally.noted)


TRAIN = [transform_of(True), transform_of(True, (48, 80), scale=(0.2, 1.0))]
EVAL = [
    transform_of(False, size, interpolation=interpolation, resize_mode=mode)
    for size in (64, (48, 80))
    for interpolation in ("bicubic", "bilinear")
    for mode in ("shortest", "longest", "squash")
]
SIZES = [(500, 375), (333, 777), (100, 70), (31, 57), (65, 64)]


@pytest.mark.parametrize("noise", [6, 40])
@pytest.mark.parametrize("transform", TRAIN + EVAL, ids=str)
def test_the_fast_decoder_gives_pillows_pixels_but_for_rounding(transform: Transform, noise: float) -> None:
    bicubic = ImageReader(transform, max_pixels=1).interpolation == InterpolationMode.BICUBIC
    for width, height in SIZES:
        data = encoded(photograph(width, height, noise), quality=95)
        crops = []
        for reader in readers(transform):
            image = reader.decode(data, Tally())
            crops.append(reader.transform(image, "1 2 key"))
            assert isinstance(image, Tensor) == (len(crops) == 1)
        assert crops[0].dtype == crops[1].dtype == torch.uint8
        assert crops[0].shape == crops[1].shape
        # when 64 pixels become 128, or 100, bilinear weights have ties that the two round differently
        assert psnr(*crops) >= (60 if bicubic else 57), (width, height)


def test_an_image_of_the_size_that_is_wanted_is_not_resampled() -> None:
    data = encoded(photograph(64, 64))
    fast, pillow = readers(transform_of(False))
    one, other = (reader.transform(reader.decode(data, Tally())) for reader in (fast, pillow))
    assert torch.equal(one, other)


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_a_place_decides_on_the_crop_and_leaves_no_trace(decoder: Any) -> None:
    reader = ImageReader(transform_of(True, scale=(0.1, 1.0)), decoder=decoder, max_pixels=10**7)
    image = reader.decode(encoded(photograph(90, 70)), Tally())
    torch.manual_seed(1)
    undisturbed = torch.rand(2)
    torch.manual_seed(1)
    first = torch.rand(1)
    crops = [reader.transform(image, place) for place in ("0 0 a", "0 0 a", "0 1 a")]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert torch.equal(torch.cat([first, torch.rand(1)]), undisturbed)


def test_without_a_place_the_global_generator_decides() -> None:
    fast, pillow = readers(transform_of(True, scale=(0.1, 1.0)))
    crops = []
    for reader in (fast, fast, pillow):
        torch.manual_seed(3)
        crops.append(reader.transform(reader.decode(encoded(photograph(90, 70)), Tally())))
    assert torch.equal(crops[0], crops[1])
    assert psnr(crops[0], crops[2]) > 60


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def jpegs() -> dict[str, bytes]:
    image = photograph(96, 64, 20)
    upright = encoded(image, exif=exif(1))
    return {
        "plain": encoded(image),
        "progressive": encoded(image, progressive=True),
        "not subsampled": encoded(image, subsampling=0),
        "stored as RGB": encoded(image, keep_rgb=True),
        "gray": encoded(image.convert("L")),
        "CMYK": encoded(image.convert("CMYK")),
        "with profile": encoded(image, icc_profile=b"\xff\xe1\xff\xda" * 20_000),
        "upright by EXIF": upright,
        "EXIF of no kind": upright.replace(b"Exif\0\0MM", b"Exif\0\0XX"),
        "EXIF cut short": upright.replace(b"*\0\0\0\x08", b"*\xff\0\0\x08"),  # Pillow warns of it
        "turned by XMP": encoded(image, xmp=b'\xff <rdf:Description tiff:Orientation="6"/>'),
        "phone's": encoded(image, "MPO", save_all=True, append_images=[photograph(32, 32)]),
        "turned, without the JFIF segment": (turned := encoded(image, exif=exif(6)))[:2] + turned[20:],
        **{f"turned {turn}": encoded(image, exif=exif(turn)) for turn in range(2, 9)},
    }


@pytest.mark.parametrize("kind", jpegs())
def test_both_decoders_read_the_same_pixels_of_every_kind_of_jpeg(kind: str) -> None:
    data = jpegs()[kind]
    fast, pillow = (outcome(reader, data) for reader in readers(transform_of(False)))
    assert fast == pillow
    assert fast[0][0] in ((64, 96, 3), (96, 64, 3))
    notes = {"CMYK": ["CMYK image is converted"], "turned": ["image is turned upright by its EXIF orientation"]}
    assert list(fast[1]) == notes.get(kind.split()[0].rstrip(","), [])


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_says(turn: int) -> None:
    data = encoded(photograph(96, 64, 20), exif=exif(turn))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    for reader in readers(transform_of(False)):
        assert outcome(reader, data)[0] == (expected.shape, expected.tobytes())


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_decoded_by_pillow(format: str) -> None:
    fast, pillow = (outcome(reader, encoded(photograph(9, 7), format)) for reader in readers(transform_of(False)))
    assert fast == pillow
    assert fast[0][0] == (7, 9, 3)


def test_both_decoders_accept_the_same_damaged_jpegs() -> None:
    draw = random.Random(0)
    sources = [data for kind, data in jpegs().items() if len(data) < 20_000]
    readers_of_both = readers(transform_of(False))
    reasons = []
    for _ in range(400):
        data = bytearray(draw.choice(sources))
        if draw.random() < 0.3:
            data = data[: draw.randrange(len(data))]
        for _ in range(draw.randrange(4)):
            if data:
                data[draw.randrange(min(len(data), draw.choice([700, len(data)])))] ^= 1 << draw.randrange(8)
        fast, pillow = (outcome(reader, bytes(data)) for reader in readers_of_both)
        assert fast == pillow
        reasons.append(fast[0] if isinstance(fast[0], str) else "decoded")
    assert set(reasons) >= {"decoded", "image cannot be decoded"}
    assert 50 < reasons.count("decoded") < 350


def test_a_jpeg_of_too_many_pixels_is_dropped() -> None:
    data = encoded(Image.new("RGB", (100, 101)))
    for reader in readers(transform_of(False), max_pixels=100 * 100):
        assert outcome(reader, data)[0] == "image has too many pixels"
    for reader in readers(transform_of(False), max_pixels=100 * 101):
        assert outcome(reader, data)[0][0] == (101, 100, 3)


UNKNOWN: list[Transform] = [
    keep_uint8(image_transform_v2(PreprocessCfg(size=16), True, {"use_timm": True})),
    Compose([RandomResizedCrop(16), ColorJitter(0.5), PILToTensor()]),
    image_transform_v2(PreprocessCfg(size=16), False),  # floats
    Compose([Resize((16, 16), interpolation=InterpolationMode.NEAREST), PILToTensor()]),
    Compose([Resize(15, max_size=16), PILToTensor()]),
    lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
]


@pytest.mark.parametrize("transform", UNKNOWN, ids=["timm", "colours", "floats", "nearest", "max_size", "function"])
def test_a_transform_that_is_not_known_gets_pil_images(transform: Transform) -> None:
    data = encoded(photograph(40, 30))
    reader = ImageReader(transform, max_pixels=10**7)
    image = reader.decode(data, Tally())
    assert isinstance(image, Image.Image)
    crops = [reader.transform(image, "place"), readers(transform)[1].transform(image, "place")]
    assert torch.equal(*crops)


def test_a_pil_image_is_transformed_whatever_the_decoder_makes() -> None:
    fast, pillow = readers(transform_of(True))
    assert torch.equal(fast.transform(photograph(90, 70), "a"), pillow.transform(photograph(90, 70), "a"))


@pytest.mark.parametrize(
    ("transform", "size"),
    [
        (transform_of(True), (64, 64)),
        (transform_of(True, (48, 80)), (48, 80)),
        (transform_of(False, (48, 80)), (48, 80)),
        (transform_of(False, resize_mode="longest"), (64, 64)),
        (transform_of(False, resize_mode="squash"), (64, 64)),
    ],
    ids=str,
)
def test_a_transform_tells_size_and_interpolation(transform: Transform, size: tuple[int, int]) -> None:
    for reader in readers(transform):
        assert reader.size == size
        assert reader.interpolation == InterpolationMode.BICUBIC


def test_a_transform_that_does_not_tell_is_an_error() -> None:
    reader = ImageReader(Compose([Resize(16), PILToTensor()]), max_pixels=1)
    with pytest.raises(ValueError, match="does not tell the size that it makes"):
        _ = reader.size
    assert reader.interpolation == InterpolationMode.BILINEAR
    reader = ImageReader(UNKNOWN[-1], max_pixels=1)
    with pytest.raises(ValueError, match="does not tell how it resizes"):
        _ = reader.interpolation


def test_image_size_is_height_and_width() -> None:
    fast, pillow = readers(transform_of(False))
    assert [image_size(reader.decode(encoded(photograph(9, 7)), Tally())) for reader in (fast, pillow)] == [(7, 9)] * 2


def test_a_reader_can_be_sent_to_another_process() -> None:
    reader = pickle.loads(pickle.dumps(ImageReader(transform_of(True), max_pixels=10**7)))
    assert reader.transform(reader.decode(encoded(photograph(90, 70)), Tally())).shape == (3, 64, 64)
