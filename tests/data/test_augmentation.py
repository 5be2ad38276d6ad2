from __future__ import annotations

import io
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from jettclip.data.augmentation import (
    OPERATIONS,
    Augmentation,
    StoredAugmentation,
    _bounds,
    draw,
    dump,
    parse,
    replay,
    select,
)
from jettclip.data.counts import Dropped
from jettclip.seeding import generator_of
from support import picture

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
SIZES = [(40, 56), (56, 40), (48, 48), (20, 150), (150, 20), (33, 90)]  # of some, most crops are the central one
CROP = (28, 36)


class TorchRandom(random.Random):
    """Draws from torch's generator, so that what is drawn can be held against torchvision's own draws."""

    def uniform(self, a: float, b: float) -> float:
        return torch.empty(1).uniform_(a, b).item()

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        assert stop is None
        return int(torch.randint(start, (1,)))


def image_of(seed: int, size: tuple[int, int]) -> Image.Image:
    smooth = Image.open(io.BytesIO(picture(seed, 12))).resize(size[::-1], Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).integers(0, 30, (*size, 3), dtype=np.uint8)
    return Image.fromarray((np.asarray(smooth) // 2 + noise).astype(np.uint8))


def channels_last(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", [BICUBIC, BILINEAR])
@pytest.mark.parametrize("of_tensors", [False, True])
def test_replay_is_bitwise_what_torchvisions_own_transforms_do(
    of_tensors: bool, interpolation: InterpolationMode
) -> None:
    """200 draws: torchvision transforms at random, and what it drew is drawn here, stored, read back and replayed."""
    crop = (v2 if of_tensors else v1).RandomResizedCrop(CROP, interpolation=interpolation, antialias=True)
    theirs = v1.Compose([crop, *([v2.ToPILImage()] if of_tensors else []), v1.RandAugment(), v1.PILToTensor()])
    used = set()
    for seed in range(200):
        picture_ = image_of(seed, SIZES[seed % len(SIZES)])
        image = channels_last(picture_) if of_tensors else picture_
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        drawn = draw(picture_.size[::-1], TorchRandom(), crop_size=CROP)
        (stored,) = parse(dump([drawn]))
        ours = replay(image, stored, CROP, interpolation)
        assert ours.dtype == torch.uint8
        assert ours.shape == (3, *CROP)
        assert torch.equal(ours, expected), (seed, drawn)
        used |= {one[0] for one in drawn.operations if one}
    assert used == set(range(len(OPERATIONS)))


def test_a_draw_is_a_function_of_its_generator() -> None:
    draws = [draw((375, 500), generator_of(0, "key", n)) for n in range(50)]
    assert draws == [draw((375, 500), generator_of(0, "key", n)) for n in range(50)]
    assert len(set(draws)) == 50
    assert all(len(one.operations) == 2 for one in draws)


def test_a_draw_follows_its_arguments() -> None:
    for seed in range(50):
        drawn = draw((300, 400), random.Random(seed), scale=(0.9, 1.0), operations=3, magnitude=0)
        assert drawn.box[2] * drawn.box[3] >= 0.89 * 300 * 400
        expected = {"Posterize": 8.0, "Solarize": 255.0}
        assert [one and one[1] for one in drawn.operations] == [
            expected.get(OPERATIONS[one[0]], 0.0) for one in drawn.operations if one
        ]
    assert draw((300, 400), random.Random(0), operations=0).operations == ()


def test_the_operations_are_those_of_datacompdr() -> None:
    assert list(v1.RandAugment()._augmentation_space(31, (224, 224))) == list(OPERATIONS)  # which lists them by index


def test_the_stored_form_is_datacompdrs() -> None:
    augmentations = [
        Augmentation((36, 280, 310, 253), ((6, 0.27), (2, -0.09000000357627869))),
        Augmentation((0, 0, 5, 7), ((0, 0.0), None)),
        Augmentation((1, 2, 3, 4), ()),
    ]
    text = dump(augmentations)
    assert json.loads(text) == [
        [[36, 280, 310, 253], [[6, 0.27], [2, -0.09000000357627869]]], [[0, 0, 5, 7], [[0, 0.0], None]],
        [[1, 2, 3, 4], []],
    ]  # fmt: skip
    for form in (text, text.encode(), json.dumps({"param_aug": text}), json.dumps({"param_aug": json.loads(text)})):
        assert parse(form) == augmentations
    drawn = [draw((375, 500), random.Random(seed)) for seed in range(200)]
    assert parse(dump(drawn)) == drawn


def test_skipped_operations_leave_the_crop() -> None:
    image = image_of(0, (40, 56))
    crop_only = replay(image, Augmentation((3, 4, 20, 30), ()), CROP, BICUBIC)
    expected = v1.functional.resized_crop(image, 3, 4, 20, 30, list(CROP), BICUBIC)
    assert torch.equal(crop_only, v1.functional.pil_to_tensor(expected))
    for text in ("[[[3,4,20,30],null]]", "[[[3,4,20,30]]]", "[[[3,4,20,30],[null,null]]]", "[[[3,4,20,30],[null]]]"):
        assert torch.equal(replay(image, parse(text)[0], CROP, BICUBIC), crop_only)
    with_one = replay(image, parse("[[[3,4,20,30],[null,[6,0.5]]]]")[0], CROP, BICUBIC)
    brighter = v1.functional.adjust_brightness(expected, 1.5)
    assert torch.equal(with_one, v1.functional.pil_to_tensor(brighter))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff\xfe", "[]", "{}", "null", "1", '"[]"', '"x', "[[]]", "[null]", "[[1,2,3,4]]", "[[[1,2,3]]]",
        '{"param_aug": null}', '{"param_aug": {}}', "[[[1,2,3,4,5]]]", "[[[1.0,2,3,4]]]", "[[[true,2,3,4]]]",
        '[[["1",2,3,4]]]', "[[[-1,2,3,4]]]", "[[[1,-2,3,4]]]", "[[[1,2,0,4]]]", "[[[1,2,3,-4]]]", "[[[1,2,3,1e999]]]",
        "[[[NaN,2,3,4]]]", "[[[1,2,3,9999999999]]]", "[[[9999999999,2,3,4]]]", "[[[1,2,3,4],[[14,0.0]]]]",
        "[[[1,2,3,4],[[-1,0.0]]]]", "[[[1,2,3,4],[[6.0,0.0]]]]", "[[[1,2,3,4],[[true,0.0]]]]",
        '[[[1,2,3,4],[["Color",0.1]]]]', "[[[1,2,3,4],[[6,NaN]]]]", "[[[1,2,3,4],[[6,Infinity]]]]",
        "[[[1,2,3,4],[[6,-2]]]]", "[[[1,2,3,4],[[10,9]]]]", "[[[1,2,3,4],[[10,-1]]]]", "[[[1,2,3,4],[[5,1e9]]]]",
        "[[[1,2,3,4],[[6,null]]]]", '[[[1,2,3,4],[[6,"0.1"]]]]', "[[[1,2,3,4],[[6,true]]]]", "[[[1,2,3,4],[[6]]]]",
        "[[[1,2,3,4],[6,0.1]]]", "[[[1,2,3,4],{}]]", "[[[1,2,3,4],false]]", "[[[1,2,3,4],[],[]]]",
        "[[[1,2,3,4],[" + ",".join(["[0,0]"] * 17) + "]]]", "[" * 100_000, "1" * 5000, "[" + " " * 2**20 + "]",
    ],
)  # fmt: skip
def test_what_is_no_stored_augmentation_is_dropped(text: str | bytes) -> None:
    with pytest.raises(Dropped) as dropped:
        parse(text)
    assert dropped.value.reason == "stored augmentation cannot be read"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(["param_aug", "x"]), children),
    max_leaves=20,
)


@given(JSON)
def test_whatever_is_parsed_can_be_replayed(value: object) -> None:
    try:
        augmentations = parse(json.dumps(value))
    except Dropped:
        return
    assert parse(dump(augmentations)) == augmentations


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
def test_every_magnitude_that_is_read_can_be_replayed(index: int) -> None:
    image = image_of(1, (40, 56))
    low, high = _bounds()[index]
    for magnitude in (low, max(low, 0.0), math.nextafter(high, 0), high):
        (stored,) = parse(f"[[[0,0,40,56],[[{index},{magnitude!r}]]]]")
        assert replay(image, stored, CROP, BICUBIC).shape == (3, *CROP)


def sets(size: tuple[int, int], count: int, number: int) -> list[StoredAugmentation]:
    """Returns one augmentation of each of several samples, `count` of which are drawn for images of a size."""
    generator = generator_of(size, count)
    return [select([draw(size, generator) for _ in range(count)], 0) for _ in range(number)]


def is_dropped(stored: StoredAugmentation, size: tuple[int, int]) -> bool:
    try:
        stored.check(size)
    except Dropped as dropped:
        return dropped.reason == "image is of another size than its stored augmentation was drawn for"
    return False


@pytest.mark.parametrize("count", [1, 2, 5, 10, 30])
@pytest.mark.parametrize("size", [(300, 300), (375, 500), (500, 375), (300, 450), (200, 800), (60, 1200)])
def test_images_of_the_right_size_pass(size: tuple[int, int], count: int) -> None:
    assert not any(is_dropped(one, size) for one in sets(size, count, 300))


@pytest.mark.parametrize(("count", "part"), [(5, 0.5), (10, 0.75), (30, 0.9)])
@pytest.mark.parametrize("size", [(400, 400), (375, 500), (300, 450), (300, 900), (60, 1200)])
def test_fewer_than_one_of_10_000_right_images_is_dropped(size: tuple[int, int], count: int, part: float) -> None:
    """The augmentations of a sample are independent, so the chance that none reaches far is a power of one's."""
    generator = generator_of(size)
    boxes = np.array([draw(size, generator, operations=0).box for _ in range(20_000)])
    chances = []
    for axis in range(2):
        if size[axis] <= size[1 - axis] * 4 / 3:
            reach = (boxes[:, axis] + boxes[:, axis + 2]) / size[axis]
            chances.append(float((reach <= part).mean()) ** count)
    assert chances
    assert sum(chances) < 1e-4


@pytest.mark.parametrize("factor", [0.5, 1.34, 2.0])
@pytest.mark.parametrize("size", [(300, 300), (375, 500), (300, 600)])
def test_images_of_another_size_are_dropped(size: tuple[int, int], factor: float) -> None:
    other = round(size[0] * factor), round(size[1] * factor)
    dropped = [is_dropped(one, other) for one in sets(size, 10, 200)]
    assert sum(dropped) >= (200 if factor > 1 else 199)


def test_boxes_may_reach_to_the_edge_and_no_further() -> None:
    stored = select([Augmentation((10, 20, 90, 180), ()), Augmentation((0, 0, 50, 60), ())], 1)
    assert stored == StoredAugmentation(Augmentation((0, 0, 50, 60), ()), None, (100, 200), 2)
    assert not is_dropped(stored, (100, 200))
    assert not is_dropped(stored, (4000, 2000))  # two boxes tell nothing of a larger image
    assert is_dropped(stored, (99, 200))
    assert is_dropped(stored, (100, 199))


def test_a_stored_size_decides() -> None:
    stored = select([Augmentation((0, 0, 10, 10), ())] * 10, 3, drawn_for=(100, 200))
    assert not is_dropped(stored, (100, 200))
    assert is_dropped(stored, (200, 100))
    assert is_dropped(stored, (100, 201))
    assert is_dropped(stored, (100, 199))
    assert is_dropped(select([Augmentation((0, 0, 10, 10), ())] * 10, 3), (100, 200))
