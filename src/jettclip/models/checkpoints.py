"""Loads weights into a model, strictly: what does not fit is an error that lists it."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from jettclip import openclip
from jettclip.models.positions import KEEP, stretch_positions
from jettclip.models.two_towers import TwoTowers

WEIGHTS = "model.safetensors"
"""The file with the model's weights in a checkpoint folder of ours."""

_POSITIONS = "text.positional_embedding"


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint: ``.safetensors``, a ``.pt`` of OpenCLIP's, or a checkpoint folder of ours.

    Nothing in a ``.pt`` is executed: it is read with ``weights_only``.

    Raises:
        ValueError: if the file cannot be read, or holds something else.
    """
    if path.is_dir():
        path = path / WEIGHTS
    try:
        state = openclip.load_state_dict(str(path), device="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("it holds more than tensors")
    except Exception as error:  # what the readers raise depends on where a file is damaged
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); "
            "give a .safetensors file, a .pt with a state_dict of tensors only, or a checkpoint folder"
        ) from error
    return state


def load_weights(model: TwoTowers, path: Path) -> None:
    """Loads a checkpoint into a model.

    Text positions for fewer tokens than the model's are stretched by Long-CLIP's rule (`stretch_positions`), the image
    positions of a native ViT are resized by OpenCLIP.

    Raises:
        ValueError: listing the keys that are missing, unknown, or of another shape.
    """
    state = read_state(path)
    if "positional_embedding" in state:  # OpenCLIP's builtin layout: the text tower at the root
        state = openclip.convert_to_custom_text_state_dict(state)
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(-1)
    openclip.resize_pos_embed(state, model)
    expected = model.state_dict()
    if _POSITIONS in state and _POSITIONS in expected and len(state[_POSITIONS]) < len(expected[_POSITIONS]):
        rows, length = len(state[_POSITIONS]), len(expected[_POSITIONS])
        logging.info(f"Stretching text positions {rows} -> {length}, the first {KEEP} kept (arXiv 2403.15378)")
        state[_POSITIONS] = stretch_positions(state[_POSITIONS], length)
    misfits = [f"missing {key}" for key in expected if key not in state]
    misfits += [f"unknown {key}" for key in state if key not in expected]
    misfits += [
        f"{key} is {list(state[key].shape)}, the model's is {list(expected[key].shape)}"
        for key in state
        if key in expected and state[key].shape != expected[key].shape
    ]
    if misfits:
        shown = "\n  ".join(misfits[:20]) + (f"\n  ... and {len(misfits) - 20} more" if len(misfits) > 20 else "")
        raise ValueError(f"{path} does not fit the model, {len(misfits)} keys differ:\n  {shown}")
    model.load_state_dict(state)
