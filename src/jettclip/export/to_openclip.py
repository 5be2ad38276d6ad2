"""Writes checkpoints and folders that plain OpenCLIP loads, where it has the architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from jettclip import openclip
from jettclip.export.compare import compare, encoders_of
from jettclip.models.checkpoints import OPENCLIP_WEIGHTS
from jettclip.models.config import PREPROCESS_KEYS, ModelConfig
from jettclip.models.text_tower import TextTower
from jettclip.models.two_towers import TwoTowers


def export_openclip(model: TwoTowers, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint for ``open_clip.create_model(NAME, pretrained=FILE)``.

    OpenCLIP prepares images by OpenAI's statistics for any file, so that the call in the report names the model's own.

    Returns:
        how far it differs, and the calls that load it and its tokenizer.
    """
    name = config.tags_of
    theirs: dict[str, Any] = openclip.get_model_config(name)
    options: dict[str, Any] = {}
    if model.context_length != theirs["text_cfg"].get("context_length", openclip.CLIPTextCfg.context_length):
        options["force_context_length"] = model.context_length
    if model.preprocess_cfg["size"] != theirs["vision_cfg"].get("image_size", openclip.CLIPVisionCfg.image_size):
        options["force_image_size"] = model.preprocess_cfg["size"]
    if model.quick_gelu and not theirs.get("quick_gelu"):
        options["force_quick_gelu"] = True
    if model.logit_bias is not None:  # which OpenCLIP loads into a model that has one, and takes from the file
        options["init_logit_bias"] = float(model.logit_bias.detach())
    has_own_text_module = theirs.get("custom_text") or "hf_model_name" in theirs["text_cfg"]
    state = _openclip_state(model)
    if not has_own_text_module:  # class CLIP, with the text tower at the root
        state = {key.removeprefix("text."): value for key, value in state.items()}
    (folder / OPENCLIP_WEIGHTS).write_bytes(save(state, {"format": "pt"}))
    loaded = openclip.create_model(name, pretrained=str(folder / OPENCLIP_WEIGHTS), **options)
    differences = compare(model, encoders_of(loaded), [model.context_length])
    options |= {f"image_{key}": value for key, value in _preprocessing(model).items()}
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    call = f"open_clip.create_model_and_transforms({name!r}, pretrained={OPENCLIP_WEIGHTS!r}, {arguments})"
    tokenizer = f"open_clip.get_tokenizer({name!r}, context_length={model.context_length})"
    return {"largest_difference": differences, "load": call, "tokenizer": tokenizer}


def export_hf(model: TwoTowers, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Writes a folder as OpenCLIP keeps them on the Hugging Face Hub, with the model's description beside the weights.

    ``open_clip.create_model('local-dir:FOLDER')`` and ``open_clip.get_tokenizer('local-dir:FOLDER')`` load it.

    Returns:
        how far it differs, and the calls that load it and its tokenizer.
    """
    described = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {**config.vision_cfg, "image_size": model.preprocess_cfg["size"]},
        "text_cfg": {**config.text_cfg, "context_length": model.context_length},
        "quick_gelu": model.quick_gelu,
        "custom_text": True,  # class CustomTextCLIP, whose keys are ours
    }
    if model.logit_bias is not None:
        described["init_logit_bias"] = float(model.logit_bias.detach())
    content = {"model_cfg": described, "preprocess_cfg": _preprocessing(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / OPENCLIP_WEIGHTS).write_bytes(save(_openclip_state(model), {"format": "pt"}))
    differences = compare(model, encoders_of(openclip.create_model(f"local-dir:{folder}")), [model.context_length])
    return {
        "largest_difference": differences,
        "load": "open_clip.create_model_and_transforms('local-dir:FOLDER')",
        "tokenizer": "open_clip.get_tokenizer('local-dir:FOLDER')",
    }


def check_openclip(model: TwoTowers, config: ModelConfig) -> None:
    """Raises ValueError for a model that OpenCLIP cannot build, or has no config for."""
    check_hf(model, config)
    theirs = openclip.get_model_config(config.tags_of)
    reason = ""
    if theirs is None:
        reason = f"OpenCLIP has no model {config.tags_of!r} to load it into"
    elif theirs.get("quick_gelu") and not model.quick_gelu:
        reason = f"OpenCLIP's {config.tags_of} has QuickGELU, and this model GELU"
    if reason:
        raise ValueError(f"{reason}; choose --format hf, which describes its own model")


def check_hf(model: TwoTowers, config: ModelConfig) -> None:
    """Raises ValueError for a model that OpenCLIP cannot build."""

    def is_ours(module: nn.Module) -> bool:
        return type(module).__module__.startswith("jettclip.")

    reason = ""
    if model.is_reparameterized:
        reason = "its branches are folded; export the checkpoint it came from"
    elif is_ours(model.text) and type(model.text) is not TextTower:
        reason = f"OpenCLIP has no text tower {type(model.text).__name__}"
    elif getattr(model.text, "mask_padding", False):
        reason = "its bidirectional text tower hides padding, which no config of OpenCLIP's can say"
    elif any(is_ours(module) for module in model.visual.modules()):
        reason = f"OpenCLIP has no image tower {config.vision_cfg.get('timm_model_name')}"
    if reason:
        raise ValueError(f"{config.name} cannot be loaded by OpenCLIP: {reason}; --format onnx takes every model")


def _openclip_state(model: TwoTowers) -> dict[str, Tensor]:
    """Returns the weights under OpenCLIP's names, in its shapes."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    return {key: value.reshape([]) if key in ("logit_scale", "logit_bias") else value for key, value in state.items()}


def _preprocessing(model: TwoTowers) -> dict[str, Any]:
    """Returns how images are prepared, but for their size, which OpenCLIP takes from the image tower."""
    cfg = openclip.PreprocessCfg(**model.preprocess_cfg)
    return {key: getattr(cfg, key) for key in PREPROCESS_KEYS}
