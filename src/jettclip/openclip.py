"""The seam to OpenCLIP: the only file that names ``open_clip`` or ``open_clip_train``.

Everything jettclip takes from OpenCLIP 3.3 passes here, so that another release of it is a change to one file. Private
names are marked; ``tests/test_openclip.py`` checks the signatures this project counts on.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import open_clip_train.params
from open_clip import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    CLIPTextCfg,
    CLIPVisionCfg,
    SimpleTokenizer,
    build_zero_shot_classifier,
    create_model,
    download_pretrained,
    get_model_config,
    get_pretrained_cfg,
    get_tokenizer,
    list_models,
    list_pretrained_tags_by_model,
)
from open_clip.convert import convert_state_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.model import (
    _build_vision_tower as build_vision_tower,  # private: CustomTextCLIP, its caller, always builds a text tower too
)
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from open_clip.tokenizer import get_clean_fn
from open_clip.transform import CenterCropOrPad, MaybeConvertMode, PreprocessCfg, ResizeKeepRatio, image_transform_v2
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock, TextTransformer
from open_clip_train.distributed import init_distributed_device_so
from open_clip_train.precision import get_autocast
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch import Tensor
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

__all__ = [
    "IMAGENET_CLASSNAMES",
    "OPENAI_IMAGENET_TEMPLATES",
    "CLIPTextCfg",
    "CLIPVisionCfg",
    "CenterCropOrPad",
    "LayerNorm",
    "MaybeConvertMode",
    "PreprocessCfg",
    "QuickGELU",
    "ResidualAttentionBlock",
    "ResizeKeepRatio",
    "SimpleTokenizer",
    "TextTransformer",
    "build_hf_text_tower",
    "build_vision_tower",
    "build_zero_shot_classifier",
    "const_lr",
    "const_lr_cooldown",
    "convert_state_dict",
    "convert_to_custom_text_state_dict",
    "cosine_lr",
    "create_model",
    "download_pretrained",
    "get_autocast",
    "get_clean_fn",
    "get_model_config",
    "get_pretrained_cfg",
    "get_tokenizer",
    "image_transform_v2",
    "init_distributed_device_so",
    "keep_uint8",
    "list_models",
    "list_pretrained_tags_by_model",
    "resize_pos_embed",
    "trainer_arguments",
    "trainer_help",
]


def trainer_arguments(argv: Sequence[str]) -> Namespace:
    """Parses flags as OpenCLIP's trainer does; an unknown one exits with status 2."""
    return open_clip_train.params.parse_args(list(argv))


def trainer_help() -> str:
    """Returns the help text of OpenCLIP's trainer."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        open_clip_train.params.parse_args(["--help"])
    return text.getvalue()


def build_hf_text_tower(text_cfg: dict[str, Any], embed_dim: int) -> HFTextEncoder:
    """Builds a text tower of transformers from the ``text_cfg`` of a model config."""
    options = CLIPTextCfg(**text_cfg)
    tower = HFTextEncoder(
        options.hf_model_name,
        output_dim=embed_dim,
        proj_type=options.hf_proj_type,
        pooler_type=options.hf_pooler_type,
        pretrained=options.hf_model_pretrained,
    )
    tower.context_length = options.context_length  # as native towers have it
    return tower


def keep_uint8(transform: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lets a transform of OpenCLIP end in uint8 pixels, which travel in a quarter of the memory of normalised floats.

    A transform that does not end in ToTensor and Normalize (timm's, with random erasing) is returned as it is.
    """
    steps: list[Any] = getattr(transform, "transforms", [])
    if len(steps) >= 2 and isinstance(steps[-2], ToTensor) and isinstance(steps[-1], Normalize):
        return Compose([*steps[:-2], PILToTensor()])
    return transform
