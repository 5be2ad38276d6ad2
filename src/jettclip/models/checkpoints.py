"""Loads weights into a model, strictly: what does not fit is an error that lists it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from jettclip import openclip
from jettclip.models.importers import State, format_of
from jettclip.models.positions import stretch_positions
from jettclip.models.reparameterize import is_reparameterized_state
from jettclip.models.torchscript import is_torchscript, read_torchscript
from jettclip.models.two_towers import TwoTowers
from jettclip.settings import ModelSettings

WEIGHTS = "model.safetensors"
"""The file with the model's weights in a checkpoint folder of ours."""

_DESCRIPTION = "jettclip"
"""The key of a safetensors file's metadata under which `describe` stands."""

OPENCLIP_WEIGHTS = "open_clip_model.safetensors"
"""The same where OpenCLIP looks for it."""

_POSITIONS = "text.positional_embedding"
_PROJECTIONS = tuple(f"visual.{layer}" for layer in ("proj", "head.", "trunk.head.", "attnpool.c_proj."))
"""Last layers of image towers, native and timm's, which map to the embedding."""


class Description(NamedTuple):
    """What a checkpoint says of its model, as far as it does; ours say all of it."""

    model: str = ""  # the name of its config
    quick_gelu: bool | None = None  # whether it has QuickGELU instead of GELU
    context_length: int | None = None
    preprocess_cfg: Mapping[str, Any] = MappingProxyType({})  # with the size of images, in pixels


class Weights(NamedTuple):
    """The weights in a checkpoint, under the names they have there, and what is known of their model."""

    path: Path
    state: State
    described: Description = Description()


def describe(model: TwoTowers) -> dict[str, str]:
    """Returns what a checkpoint should say of a model, as the metadata of a safetensors file."""
    length = None if model.embedding_width else model.context_length
    described = Description(model.name, model.quick_gelu, length, model.preprocess_cfg)
    return {"format": "pt", _DESCRIPTION: json.dumps(described._asdict())}


def read_weights(path: Path) -> Weights:
    """Reads a checkpoint of any format that `importers` knows, from a file or from a folder of ours or of OpenCLIP's.

    Nothing in the file is executed: pickles are read with ``weights_only``, and of TorchScript only the tensors.

    Raises:
        ValueError: if the file cannot be read, or holds something else.
    """
    if path.is_dir():
        path = next((path / name for name in (WEIGHTS, OPENCLIP_WEIGHTS) if (path / name).exists()), path / WEIGHTS)
    try:
        if path.stat().st_size == 0:
            raise TypeError("it is empty")
        content, described = _read(path)
        for name in ("state_dict", "module"):  # OpenCLIP's and DeepSpeed's training checkpoints
            content = content[name] if isinstance(content.get(name), dict) else content
        if not content or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            raise TypeError("it holds no weights" if not content else "it holds more than tensors")
        state = {key.removeprefix("module."): _precise(value) for key, value in content.items()}
        known = format_of(state)
        if described.quick_gelu is None:
            described = described._replace(quick_gelu=known.quick_gelu)
    except Exception as error:  # what the readers raise depends on where a file is damaged
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        if "weights_only" in reason:  # torch goes on to advise what we refuse
            reason = "it is damaged, or a pickle of more than tensors, of which nothing is executed here"
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); "
            "give a .safetensors file, a .pt with a state_dict of tensors only, or a checkpoint folder"
        ) from error
    return Weights(path, state, described)


def load_weights(model: TwoTowers, weights: Weights | Path, settings: ModelSettings = ModelSettings()) -> None:
    """Loads a checkpoint into a model.

    Text positions for fewer tokens than the model's are stretched (`stretch_positions`), the image positions of a
    native ViT are resized by OpenCLIP. A bias of the logits comes with the checkpoint, also to a model that had none;
    where the checkpoint has none, the model keeps its own.

    Args:
        model: the model.
        weights: what `read_weights` read, or the checkpoint.
        settings: how to stretch text positions.

    Raises:
        ValueError: listing the keys that are missing, unknown, or of another shape; or for another activation.
    """
    weights = weights if isinstance(weights, Weights) else read_weights(weights)
    _check_activation(model, weights.path, weights.described)
    if not model.is_reparameterized:
        _check_unfolded(weights)
    state = _for_model(weights, model)
    _fit_bias(model, state)
    expected = model.state_dict()
    if _POSITIONS in state and _POSITIONS in expected and len(state[_POSITIONS]) < len(expected[_POSITIONS]):
        rows, length = len(state[_POSITIONS]), len(expected[_POSITIONS])
        kept = settings.position_keep
        logging.info(f"Stretching text positions {rows} -> {length}, the first {kept} kept (arXiv 2403.15378)")
        state[_POSITIONS] = stretch_positions(state[_POSITIONS], length, *settings.stretch)
    elif settings.stretch != ModelSettings().stretch:
        logging.warning(f"--position-keep, -ratio and -tail change nothing: {weights.path} needs no stretching")
    _load(model, state, weights.path)


def check_description(model: TwoTowers, path: Path) -> None:
    """Checks what a run's checkpoint says of its model against one that was built by the flags given now.

    Its weights are not read.

    Raises:
        ValueError: if the model has another activation, or prepares images in another way, than the run's.
    """
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            described = _description_in(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}); resume from another one") from error
    _check_activation(model, path, described)
    before, now = (json.dumps(cfg, sort_keys=True) for cfg in (dict(described.preprocess_cfg), model.preprocess_cfg))
    if described.preprocess_cfg and before != now:
        raise ValueError(
            f"{path} was trained on images prepared by {before}, and the flags mean {now}; "
            "give the same --force-image-size and --image-... flags"
        )


def load_image_tower(model: TwoTowers, weights: Weights) -> None:
    """Loads the image tower of a checkpoint; the rest of the model stays as it is.

    A projection to another embedding width than the model's starts anew.

    Raises:
        ValueError: listing the keys of the image tower that are missing, unknown, or of another shape; or for another
            activation.
    """
    if not hasattr(model.visual, "trunk"):  # timm's towers have activations of their own
        _check_activation(model, weights.path, weights.described)
    _check_unfolded(weights)
    state = {key: value for key, value in _for_model(weights, model).items() if key.startswith("visual.")}
    for key, value in model.state_dict().items():
        if not key.startswith("visual."):
            state[key] = value
        elif key in state and key.startswith(_PROJECTIONS) and state[key].shape != value.shape:
            logging.info(f"{weights.path}: {key} is {list(state[key].shape)}, here {list(value.shape)}; it starts anew")
            state[key] = value
    _load(model, state, weights.path)


def _check_unfolded(weights: Weights) -> None:
    if is_reparameterized_state(weights.state):
        raise ValueError(f"{weights.path} is reparameterised, for inference only; give the checkpoint it came from")


def _check_activation(model: TwoTowers, path: Path, described: Description) -> None:
    if described.quick_gelu not in (None, model.quick_gelu):
        raise ValueError(
            f"{path} was trained with quick_gelu={described.quick_gelu}, the model has quick_gelu="
            f"{model.quick_gelu}; choose a --model, and a --pretrained to start from, of the same activation"
        )


def _for_model(weights: Weights, model: TwoTowers) -> State:
    """Renames the keys of a checkpoint to the model's, and resizes image positions."""
    try:
        state = dict(format_of(weights.state).convert(weights.state, model))
    except ValueError as error:
        raise ValueError(f"{weights.path} does not fit the model: {error}") from error
    for name in ("logit_scale", "logit_bias"):
        if name in state:
            state[name] = state[name].reshape(-1)
    with contextlib.suppress(RuntimeError, IndexError):  # a table of no square grid; its shape will not fit
        openclip.resize_pos_embed(state, model)
    return state


def _fit_bias(model: TwoTowers, state: State) -> None:
    """Gives the model a bias where only the checkpoint has one, and the other way round: any model may have one."""
    if model.logit_bias is not None:
        state.setdefault("logit_bias", model.logit_bias.detach())
    elif "logit_bias" in state:
        model.logit_bias = nn.Parameter(torch.zeros_like(model.logit_scale), requires_grad=False)


def _load(model: TwoTowers, state: State, path: Path) -> None:
    expected = model.state_dict()
    misfits = [f"missing {key}" for key in expected if key not in state]
    misfits += [f"unknown {key}" for key in state if key not in expected]
    misfits += [
        f"{key} is {list(state[key].shape)}, the model's is {list(expected[key].shape)}"
        for key in state
        if key in expected and state[key].shape != expected[key].shape
    ]
    if misfits:
        shown = "; ".join(misfits[:20]) + (f"; and {len(misfits) - 20} more" if len(misfits) > 20 else "")
        raise ValueError(f"{path} does not fit the model, {len(misfits)} keys differ: {shown}")
    model.load_state_dict(state)


def _read(path: Path) -> tuple[dict[str, Any], Description]:
    """Returns what a file holds, and what a safetensors file of ours says of its model."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, _description_in(file)  # noqa: SIM118
    if is_torchscript(path):
        return read_torchscript(path), Description()
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    return content, Description()


def _description_in(file: Any) -> Description:
    return Description(**json.loads((file.metadata() or {}).get(_DESCRIPTION, "{}")))


def _precise(value: Tensor) -> Tensor:
    """Raises half precision to float32, before anything is computed from it."""
    return value.float() if value.is_floating_point() else value
