"""The image tower of ``Nano-248``: small enough to learn on two CPU cores."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.convmixer import ConvMixer


@register_model  # type: ignore[untyped-decorator]
def convmixer_nano(pretrained: bool = False, **options: Any) -> ConvMixer:
    """Builds four depthwise blocks of width 128 over 8 x 8 patches (ConvMixer, arXiv 2201.09792), for timm's registry.

    Raises:
        ValueError: if pretrained weights are asked for; there are none.
    """
    if pretrained:
        raise ValueError("convmixer_nano has no pretrained weights; leave --pretrained-image out")
    taken = {name: options[name] for name in ("num_classes", "global_pool", "in_chans") if name in options}
    return ConvMixer(dim=128, depth=4, kernel_size=5, patch_size=8, **taken)
