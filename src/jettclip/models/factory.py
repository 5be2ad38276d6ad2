"""Builds models, their image transforms and their tokenizers by name, as OpenCLIP's factory does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from jettclip import openclip
from jettclip.models import nano  # noqa: F401 (registers its tower with timm)
from jettclip.models.checkpoints import load_weights
from jettclip.models.config import ModelConfig, get_model_config
from jettclip.models.text_tower import build_text_tower
from jettclip.models.two_towers import TwoTowers

Transform = Callable[[Image.Image], Tensor]


def create_model(
    model_name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | Sequence[int] | None = None,
    force_context_length: int | None = None,
    pretrained_image: bool = False,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    cache_dir: str | None = None,
) -> TwoTowers:
    """Builds a model by name; the arguments are those of OpenCLIP's function of the same name.

    Args:
        model_name: one of `list_models`.
        pretrained: a checkpoint file or folder, or a tag of OpenCLIP's. Text positions for fewer tokens than the model
            has are stretched by Long-CLIP's rule.
        device: where to put the model.
        pretrained_image: start a timm image tower from timm's own weights, unless there are weights of the whole model.

    Raises:
        ValueError: for a name, tag or checkpoint that does not fit, or image weights that do not exist.
    """
    config = get_model_config(model_name)
    vision_cfg, text_cfg = dict(config.vision_cfg), dict(config.text_cfg)
    if force_patch_dropout is not None:
        vision_cfg["patch_dropout"] = force_patch_dropout
    if force_image_size is not None:
        sides = [force_image_size] if isinstance(force_image_size, int) else list(force_image_size)
        vision_cfg["image_size"] = sides[0] if len(sides) == 1 else tuple(sides)
    if force_context_length is not None:
        text_cfg["context_length"] = force_context_length
    config = replace(config, vision_cfg=vision_cfg, text_cfg=text_cfg, quick_gelu=config.quick_gelu or force_quick_gelu)

    weights, published = find_weights(config, pretrained, cache_dir) if pretrained else (None, {})
    given = {
        "mean": image_mean, "std": image_std, "interpolation": image_interpolation, "resize_mode": image_resize_mode
    }  # fmt: skip
    preprocess_cfg = {
        **config.preprocess_cfg,
        **published,
        **{key: value for key, value in given.items() if value is not None},
        "size": vision_cfg.get("image_size", 224),
    }
    model = _build(config, preprocess_cfg, pretrained_image and weights is None)
    if weights is not None:
        load_weights(model, weights)
        logging.info(f"Loaded {weights} into {config.name}")
    if force_image_size is not None and hasattr(model.visual, "set_input_size"):
        model.visual.set_input_size(vision_cfg["image_size"])
    return model.to(device)


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, *, aug_cfg: dict[str, Any] | None = None, **options: Any
) -> tuple[TwoTowers, Transform, Transform]:
    """Builds a model with the image transforms for training and for evaluation.

    Args:
        model_name, pretrained, options: as for `create_model`.
        aug_cfg: OpenCLIP's augmentation options, such as ``{"scale": (0.4, 1.0)}``.
    """
    model = create_model(model_name, pretrained, **options)
    preprocess = openclip.PreprocessCfg(**model.preprocess_cfg)
    train = openclip.image_transform_v2(preprocess, is_train=True, aug_cfg=aug_cfg)
    return model, train, openclip.image_transform_v2(preprocess, is_train=False)


def get_tokenizer(
    model_name: str, context_length: int | None = None, *, cache_dir: str | None = None, **options: Any
) -> Callable[..., Tensor]:
    """Returns a model's tokenizer: texts to token ids int64 [n, L], padded with 0, cut to L with the end token last.

    Args:
        model_name: one of `list_models`.
        context_length: L; the model's by default.
        cache_dir: where a tokenizer of transformers is kept.
        options: passed on to OpenCLIP's tokenizer, such as ``clean="whitespace"``.
    """
    config = get_model_config(model_name)
    if config.name in openclip.list_models():
        return openclip.get_tokenizer(config.name, context_length=context_length, cache_dir=cache_dir, **options)
    length = context_length or config.text_cfg["context_length"]
    return openclip.SimpleTokenizer(context_length=length, **{**config.text_cfg.get("tokenizer_kwargs", {}), **options})


def same_tokenizer(model_name: str, other: str) -> bool:
    """Tells whether two models read the same token ids, but for the length to which each cuts its captions.

    Tokenizers of different names count as different, even where their vocabularies are copies of one another.
    """
    ours, theirs = (openclip.CLIPTextCfg(**get_model_config(name).text_cfg) for name in (model_name, other))
    keys = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "vocab_size")
    return all(getattr(ours, key) == getattr(theirs, key) for key in keys)


def find_weights(config: ModelConfig, pretrained: str, cache_dir: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Finds the checkpoint that ``--pretrained`` means: a tag of OpenCLIP's, which is downloaded, or else a path.

    Returns:
        the path, and what is published with a tag: its mean, std, interpolation and resize mode.

    Raises:
        ValueError: if it is neither a path nor a tag of this model.
    """
    published = openclip.get_pretrained_cfg(config.tags_of, pretrained)
    if not published:
        if Path(pretrained).exists():
            return Path(pretrained), {}
        tags = openclip.list_pretrained_tags_by_model(config.tags_of)
        raise ValueError(
            f"--pretrained {pretrained!r} is neither a file or folder nor a tag of {config.name}; "
            f"its tags are {', '.join(tags) or 'none'}"
        )
    if bool(published.get("quick_gelu")) != config.quick_gelu:
        logging.warning(
            f"{config.tags_of} {pretrained} was trained with quick_gelu={bool(published.get('quick_gelu'))}, the model "
            f"has quick_gelu={config.quick_gelu}; choose the config with or without -quickgelu, or --force-quick-gelu"
        )
    keys = ("mean", "std", "interpolation", "resize_mode")
    path = openclip.download_pretrained(published, cache_dir=cache_dir)
    return Path(path), {key: published[key] for key in keys if key in published}


def _build(config: ModelConfig, preprocess_cfg: dict[str, Any], pretrained_image: bool) -> TwoTowers:
    vision_cfg = openclip.CLIPVisionCfg(**config.vision_cfg)
    if pretrained_image and not vision_cfg.timm_model_name:
        raise ValueError(
            f"--pretrained-image: the image tower of {config.name} is not timm's, the only one with weights of its "
            "own; leave it out, and give --pretrained for weights of the whole model"
        )
    vision_cfg.timm_model_pretrained = pretrained_image
    preprocess = openclip.PreprocessCfg(**preprocess_cfg)
    text: nn.Module
    if "hf_model_name" in config.text_cfg:
        text = openclip.build_hf_text_tower(config.text_cfg, config.embed_dim)
    else:
        text = build_text_tower(config.text_cfg, config.embed_dim, config.quick_gelu, config.mask_padding)
    return TwoTowers(
        openclip.build_vision_tower(config.embed_dim, vision_cfg, config.quick_gelu),
        text,
        embed_dim=config.embed_dim,
        mean=preprocess.mean,
        std=preprocess.std,
        logit_scale=1 / 0.07 if config.init_logit_scale is None else math.exp(config.init_logit_scale),
        preprocess_cfg=preprocess_cfg,
    )
