"""Builds models, their image transforms and their tokenizers by name, as OpenCLIP's factory does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from jettclip import openclip
from jettclip.models import nano  # noqa: F401 (registers its tower with timm)
from jettclip.models.adapter import build_adapter
from jettclip.models.checkpoints import Description, Weights, load_image_tower, load_weights, read_weights
from jettclip.models.config import PREPROCESS_KEYS, ModelConfig, get_model_config
from jettclip.models.mct import build_mct
from jettclip.models.reparameterize import is_reparameterized_state, reparameterize
from jettclip.models.text_tower import build_text_tower
from jettclip.models.tokenizer import CachedTokenizer
from jettclip.models.two_towers import TwoTowers
from jettclip.settings import ModelSettings

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
    settings: ModelSettings = ModelSettings(),
) -> TwoTowers:
    """Builds a model by name; the arguments but the last are those of OpenCLIP's function of the same name.

    Args:
        model_name: one of `list_models`.
        pretrained: a checkpoint file or folder (of ours, OpenCLIP's, OpenAI's, MobileCLIP's, Long-CLIP's, JettCLIP's or
            LLM2CLIP's), or a tag of OpenCLIP's. Text positions for fewer tokens than the model has are stretched by
            Long-CLIP's rule. Where it tells whether its model has QuickGELU, so has this one.
        device: where to put the model.
        pretrained_image: start a timm image tower from timm's own weights, unless there are weights of the whole model.
        settings: how positions are stretched, which are frozen, another checkpoint for the image tower.

    Raises:
        ValueError: for a name, tag or checkpoint that does not fit, or image weights that do not exist.
    """
    config = get_model_config(model_name)
    weights = find_weights(config, pretrained, cache_dir) if pretrained else None
    if weights:
        config = _follow(config, weights)
    image_weights = _find_image_weights(settings.pretrained_image_from, cache_dir)
    if image_weights and not weights and image_weights.described.quick_gelu is not None:
        config = replace(config, quick_gelu=image_weights.described.quick_gelu)
    config = _change(config, force_quick_gelu, force_patch_dropout, force_image_size, force_context_length)
    given = dict(zip(PREPROCESS_KEYS, (image_mean, image_std, image_interpolation, image_resize_mode), strict=True))
    preprocess_cfg = {
        **config.preprocess_cfg,
        **{key: value for key, value in given.items() if value is not None},
        "size": config.vision_cfg.get("image_size", 224),
    }
    model = _build(config, preprocess_cfg, pretrained_image and weights is None)
    if weights is not None:
        if is_reparameterized_state(weights.state):
            model = reparameterize(model)
        if force_quick_gelu:
            weights = weights._replace(described=weights.described._replace(quick_gelu=True))
        load_weights(model, weights, settings)
        logging.info(f"Loaded {weights.path} into {config.name}")
    if image_weights is not None:
        load_image_tower(model, image_weights)
        logging.info(f"Loaded the image tower of {image_weights.path} into {config.name}")
    if settings.freeze_position_prefix:
        model.freeze_position_prefix(settings.freeze_position_prefix)
    if force_image_size is not None and hasattr(model.visual, "set_input_size"):
        model.visual.set_input_size(config.vision_cfg["image_size"])
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
        options: passed on to the tokenizer, such as ``clean="whitespace"``; they are those of OpenCLIP's.
    """
    config = get_model_config(model_name)
    if config.text_tower == "adapter":
        raise ValueError(f"model {config.name!r} reads stored embeddings, not text, and has no tokenizer")
    if config.text_cfg.get("hf_tokenizer_name"):
        _need_transformers(config)
        return openclip.get_tokenizer(config.name, context_length=context_length, cache_dir=cache_dir, **options)
    length = context_length or config.text_cfg.get("context_length", openclip.CLIPTextCfg.context_length)
    return CachedTokenizer(context_length=length, **{**config.text_cfg.get("tokenizer_kwargs", {}), **options})


def find_weights(config: ModelConfig, pretrained: str, cache_dir: str | None = None) -> Weights:
    """Reads the checkpoint that ``--pretrained`` means: a tag of OpenCLIP's, which is downloaded, or else a path.

    Raises:
        ValueError: if it is neither a path nor a tag of this model, or cannot be read.
    """
    published = openclip.get_pretrained_cfg(config.tags_of, pretrained)
    if not published:
        if Path(pretrained).exists():
            return read_weights(Path(pretrained))
        tags = openclip.list_pretrained_tags_by_model(config.tags_of)
        raise ValueError(
            f"{pretrained!r} is neither a file or folder nor a tag of {config.name}; "
            f"its tags are {', '.join(tags) or 'none'}"
        )
    preprocess_cfg = {key: published[key] for key in PREPROCESS_KEYS if key in published}
    weights = read_weights(Path(openclip.download_pretrained(published, cache_dir=cache_dir)))
    return weights._replace(
        described=Description(quick_gelu=published.get("quick_gelu"), preprocess_cfg=preprocess_cfg)
    )


def _change(
    config: ModelConfig,
    quick_gelu: bool,
    patch_dropout: float | None,
    image_size: int | Sequence[int] | None,
    context_length: int | None,
) -> ModelConfig:
    """Returns a config with what the flags ``--force-...`` change."""
    if context_length is not None and context_length < 1:
        raise ValueError(f"--force-context-length {context_length} must be positive, such as 248")
    if context_length is not None and config.text_tower == "adapter":
        raise ValueError(
            f"--force-context-length {context_length}: {config.name} reads stored embeddings, not tokens; leave it out"
        )
    vision_cfg, text_cfg = dict(config.vision_cfg), dict(config.text_cfg)
    if patch_dropout is not None:
        vision_cfg["patch_dropout"] = patch_dropout
    if image_size is not None:
        sides = [image_size] if isinstance(image_size, int) else list(image_size)
        vision_cfg["image_size"] = sides[0] if len(sides) == 1 else tuple(sides)
    if context_length is not None:
        text_cfg["context_length"] = context_length
    return replace(config, vision_cfg=vision_cfg, text_cfg=text_cfg, quick_gelu=config.quick_gelu or quick_gelu)


def _follow(config: ModelConfig, weights: Weights) -> ModelConfig:
    """Gives a model what its weights were trained with, where they tell.

    Activation and preprocessing belong to the weights. Image size and context length are taken over from a checkpoint
    of the same config only: another config is chosen for its own.
    """
    told = weights.described
    vision_cfg, text_cfg, preprocess_cfg = dict(config.vision_cfg), dict(config.text_cfg), dict(told.preprocess_cfg)
    size = preprocess_cfg.pop("size", None)
    if told.model == config.name:
        if size is not None:
            vision_cfg["image_size"] = tuple(size) if isinstance(size, list) else size
        if told.context_length is not None:
            text_cfg["context_length"] = told.context_length
    followed = replace(
        config,
        vision_cfg=vision_cfg,
        text_cfg=text_cfg,
        quick_gelu=config.quick_gelu if told.quick_gelu is None else told.quick_gelu,
        preprocess_cfg={**config.preprocess_cfg, **preprocess_cfg},
    )
    for name in ("vision_cfg", "text_cfg", "quick_gelu"):
        if getattr(followed, name) != getattr(config, name):
            logging.info(f"As {weights.path} says, {name} of {config.name} is {getattr(followed, name)}")
    return followed


def _find_image_weights(source: str, cache_dir: str | None) -> Weights | None:
    """Reads what ``--pretrained-image-from`` means: a checkpoint, or ``MODEL:TAG`` of OpenCLIP's."""
    name, _, tag = source.partition(":")
    if not source:
        return None
    if Path(source).exists():
        return read_weights(Path(source))
    if not tag:
        raise ValueError(f"--pretrained-image-from {source!r} is neither a checkpoint nor MODEL:TAG of OpenCLIP's")
    return find_weights(get_model_config(name), tag, cache_dir)


def _build(config: ModelConfig, preprocess_cfg: dict[str, Any], pretrained_image: bool) -> TwoTowers:
    vision_cfg = openclip.CLIPVisionCfg(**config.vision_cfg)
    if pretrained_image and not vision_cfg.timm_model_name:
        raise ValueError(
            f"--pretrained-image: the image tower of {config.name} is not timm's, the only one with weights of its "
            "own; leave it out, and give --pretrained for weights of the whole model"
        )
    vision_cfg.timm_model_pretrained = pretrained_image
    preprocess = openclip.PreprocessCfg(**preprocess_cfg)
    try:
        visual = openclip.build_vision_tower(config.embed_dim, vision_cfg, config.quick_gelu)
    except TypeError as error:
        if not vision_cfg.patch_dropout:
            raise
        raise ValueError(
            f"--force-patch-dropout {vision_cfg.patch_dropout:g}: the image tower of {config.name} has no patches to "
            "drop; leave it out"
        ) from error
    return TwoTowers(
        visual,
        _build_text(config),
        embed_dim=config.embed_dim,
        mean=preprocess.mean,
        std=preprocess.std,
        logit_scale=1 / 0.07 if config.init_logit_scale is None else math.exp(config.init_logit_scale),
        logit_bias=config.init_logit_bias,
        preprocess_cfg=preprocess_cfg,
        name=config.name,
        quick_gelu=config.quick_gelu,
    )


def _build_text(config: ModelConfig) -> nn.Module:
    if config.text_tower == "adapter":
        return build_adapter(config.text_cfg, config.embed_dim)
    if "hf_model_name" in config.text_cfg:
        _need_transformers(config)
        return openclip.build_hf_text_tower(config.text_cfg, config.embed_dim)
    build = build_mct if config.text_tower == "mct" else build_text_tower
    return build(config.text_cfg, config.embed_dim, config.quick_gelu, config.mask_padding)


def _need_transformers(config: ModelConfig) -> None:
    if find_spec("transformers") is None:
        raise ValueError(f"model {config.name!r} needs the package transformers; run: pip install transformers")
