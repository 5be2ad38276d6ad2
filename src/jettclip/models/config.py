"""Model descriptions by name: ours in ``configs/``, and every one that OpenCLIP has."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jettclip import openclip

PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""What OpenCLIP publishes of how images are prepared; their size is the image tower's."""

FOLDER = Path(__file__).parent / "configs"
_IGNORED_KEYS = {"custom_text", "nonscalar_logit_scale"}  # our model is always of two separate towers, its scale [1]


@dataclass(frozen=True)
class ModelConfig:
    """A model in OpenCLIP's config format, with the keys that are ours."""

    name: str
    embed_dim: int
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: bool = False
    init_logit_scale: float | None = None  # a logarithm, as in OpenCLIP
    init_logit_bias: float | None = None  # SigLIP's; a sigmoid loss trains it
    # ours:
    text_tower: str = ""  # "mct", "adapter"; otherwise OpenCLIP's text transformer, or a model of transformers
    mask_padding: bool = False  # no token of a bidirectional text tower sees padding
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)  # mean, std, interpolation, resize_mode
    pretrained_as: str = ""  # the OpenCLIP model whose pretrained tags fit

    @property
    def tags_of(self) -> str:
        """The name under which OpenCLIP lists pretrained weights for this model."""
        return self.pretrained_as or self.name


def our_models() -> list[str]:
    """Returns the names of the models that are ours, in alphabetical order."""
    return list(_ours())


def list_models() -> list[str]:
    """Returns the names of all models, ours first."""
    return [*our_models(), *openclip.list_models()]


def get_model_config(name: str) -> ModelConfig:
    """Returns the config of a model.

    Raises:
        ValueError: for an unknown name, with the nearest known ones, or a model this trainer cannot train.
    """
    name = name.replace("/", "-")
    config = json.loads(_ours()[name].read_text()) if name in _ours() else openclip.get_model_config(name)
    if config is None:
        known = {model.lower(): model for model in list_models()}
        near = [known[model] for model in difflib.get_close_matches(name.lower(), known, 4, 0.5)]
        raise ValueError(f"model {name!r} is not known; did you mean {' or '.join(near) or 'one of list_models()'}?")
    config = {key: value for key, value in config.items() if key not in _IGNORED_KEYS}
    unknown = set(config) - set(ModelConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"model {name!r} needs {', '.join(sorted(unknown))}, which jettclip does not train; "
            "choose a model of one image and one text tower, without a decoder"
        )
    return ModelConfig(name=name, **{"preprocess_cfg": _published_preprocessing(name), **config})


@cache
def _ours() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"), key=lambda path: path.stem)}


def _published_preprocessing(name: str) -> dict[str, Any]:
    """Returns what all published weights of an OpenCLIP model agree on, such as MobileCLIP's mean 0 and std 1.

    OpenCLIP itself prepares images by OpenAI's statistics unless a tag is given, whatever the model.
    """
    configs = [openclip.get_pretrained_cfg(name, tag) for tag in openclip.list_pretrained_tags_by_model(name)]
    return {
        key: configs[0][key] for key in PREPROCESS_KEYS if configs and all(c[key] == configs[0][key] for c in configs)
    }
