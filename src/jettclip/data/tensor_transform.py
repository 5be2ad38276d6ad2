"""Crops and resizes uint8 tensors as torchvision's and OpenCLIP's transforms do PIL images, several times faster.

torch's antialiased uint8 kernel gives Pillow's pixels but for rounding, if the channels of a pixel lie side by side in
memory, and if rows and columns are resized in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, RandomResizedCrop, Resize

from jettclip.openclip import CenterCropOrPad, MaybeConvertMode, ResizeKeepRatio

Step = Callable[[Tensor, torch.Generator], Tensor]
"""What becomes of an image, uint8 [3, H, W]; whatever is random is drawn from the generator."""

_TRIES = 10  # of RandomResizedCrop to fit a box into the image
_PILLOW_CHOOSES = int(PIL.__version__.split(".")[0]) >= 13  # to resize columns first (python-pillow/Pillow #9549)
_ANTIALIASED = (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR)


def tensor_steps(transform: Callable[..., Tensor]) -> list[Step] | None:
    """Returns the steps of a transform of PIL images for tensors; None if there is one that is not known."""
    steps = getattr(transform, "transforms", [])
    if not steps or type(steps[-1]) is not PILToTensor:
        return None
    known = [tensor_step(step) for step in steps[:-1]]
    return None if None in known else [step for step in known if step is not None]


def tensor_step(step: Any) -> Step | None:
    """Returns one step of a transform for tensors; None if it is not known."""
    mode = getattr(step, "interpolation", None)
    if type(step) in (CenterCrop, CenterCropOrPad, MaybeConvertMode):
        return partial(_apply, step)
    if mode not in _ANTIALIASED:
        return None
    if type(step) is RandomResizedCrop:
        return partial(_crop_at_random, step)
    if type(step) is Resize and step.max_size is None:
        return partial(_resize_to, step)
    if type(step) is ResizeKeepRatio and not (step.random_scale_prob or step.random_aspect_prob):
        return partial(_resize_keeping_ratio, step)
    return None


def _apply(step: Callable[[Tensor], Tensor], image: Tensor, _: torch.Generator) -> Tensor:
    return step(image)


def _resize(image: Tensor, size: Sequence[int], mode: InterpolationMode) -> Tensor:
    """Resizes as Pillow does, in which the order of the two passes decides how single pixels are rounded."""
    height, width = image.shape[1:]
    if (height, width) == tuple(size):
        return image
    # torch takes the fast way if the whole batch of one, too, says that channels lie side by side
    batch = torch.from_numpy(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).unsqueeze(0).permute(0, 3, 1, 2)
    if _PILLOW_CHOOSES and height - size[0] > max(0, 2 * (width - size[1])):
        batch = interpolate(batch, (size[0], width), mode=mode.value, antialias=True)
    return interpolate(batch, tuple(size), mode=mode.value, antialias=True)[0]  # rows first


def _resize_to(step: Any, image: Tensor, _: torch.Generator) -> Tensor:
    height, width = image.shape[1:]
    size = [step.size] if isinstance(step.size, int) else list(step.size)
    if len(size) == 1:  # of the shorter side
        short = size[0]
        size = [short, int(short * width / height)] if height <= width else [int(short * height / width), short]
    return _resize(image, size, step.interpolation)


def _resize_keeping_ratio(step: Any, image: Tensor, _: torch.Generator) -> Tensor:
    ratios = [actual / wanted for actual, wanted in zip(image.shape[1:], step.size, strict=True)]
    ratio = max(ratios) * step.longest + min(ratios) * (1 - step.longest)
    return _resize(image, [round(actual / ratio) for actual in image.shape[1:]], step.interpolation)


def _crop_at_random(step: Any, image: Tensor, generator: torch.Generator) -> Tensor:
    box = random_box(image.shape[1], image.shape[2], tuple(step.scale), tuple(step.ratio), generator)
    top, left, height, width = box
    return _resize(image[:, top : top + height, left : left + width], step.size, step.interpolation)


def random_box(
    height: int, width: int, scale: tuple[float, ...], ratio: tuple[float, ...], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draws what `RandomResizedCrop.get_params` draws with the same generator, in a fraction of the time.

    Args:
        height, width: of the image.
        scale: share of the area, from and to.
        ratio: of width to height, from and to.
        generator: of torch.

    Returns:
        top, left, height and width of the crop.
    """
    area, log_ratio = height * width, _logarithms(ratio)
    drawn, place = torch.empty(1), torch.empty(1, dtype=torch.int64)
    for _ in range(_TRIES):
        target = area * drawn.uniform_(scale[0], scale[1], generator=generator).item()
        aspect = drawn.uniform_(log_ratio[0], log_ratio[1], generator=generator).exp_().item()
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = place.random_(0, height - h + 1, generator=generator).item()
            return int(top), int(place.random_(0, width - w + 1, generator=generator).item()), h, w
    w, h = min(width, round(height * max(ratio))), min(height, round(width / min(ratio)))  # in the middle
    return (height - h) // 2, (width - w) // 2, h, w


@cache
def _logarithms(ratio: tuple[float, ...]) -> list[float]:
    return torch.tensor(ratio).log().tolist()
