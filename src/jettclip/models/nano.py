"""The image tower of ``Nano-248``: small enough to learn on two CPU cores."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.convmixer import ConvMixer
from torch import nn

GRID = 4
"""Features are averaged over the cells of a grid of so many rows and columns, whatever the image size."""


class GridConvMixer(ConvMixer):
    """A ConvMixer (arXiv 2201.09792) whose head sees where things are.

    ConvMixer averages its features over the whole image. Here they are averaged over the cells of a grid, which the
    head maps to the embedding together: long captions tell of places, and so small a tower learns them much sooner.
    """

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by one for so many outputs; the pooling stays as it is."""
        self.num_classes = num_classes
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(GRID), nn.Flatten())
        self.head_hidden_size = self.num_features * GRID**2
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()


@register_model  # type: ignore[untyped-decorator]
def convmixer_nano(
    pretrained: bool = False, num_classes: int = 1000, in_chans: int = 3, **options: Any
) -> GridConvMixer:
    """Builds four depthwise blocks of width 128 over 8 x 8 patches, for timm's registry.

    Raises:
        ValueError: if pretrained weights are asked for; there are none.
        TypeError: if patches are to be dropped, as timm's other towers without patches do.
    """
    if options.get("patch_drop_rate"):
        raise TypeError("convmixer_nano has no patches to drop")
    if pretrained:
        raise ValueError("convmixer_nano has no pretrained weights; leave --pretrained-image out")
    tower = GridConvMixer(dim=128, depth=4, kernel_size=5, patch_size=8, in_chans=in_chans, num_classes=num_classes)
    tower.reset_classifier(num_classes)
    return tower
