from __future__ import annotations

import random

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from jettclip.data.tensor_transform import random_box

# tests/data/test_images.py compares the transforms' pixels with Pillow's


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.99, 1.01), (2.0, 3.0)])
def test_boxes_are_drawn_as_torchvision_draws_them(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    sizes = random.Random(0)
    for seed in range(700):
        height, width = sizes.randint(1, 700), sizes.randint(1, 700)
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(ratio))
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert random_box(height, width, scale, ratio, torch.default_generator) == expected
        assert torch.equal(torch.rand(3), after)
