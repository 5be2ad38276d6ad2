"""Writes both towers as ONNX, for batches and captions of any length."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jettclip.export.compare import Encoders, compare
from jettclip.models.config import ModelConfig
from jettclip.models.reparameterize import reparameterize
from jettclip.models.two_towers import TwoTowers, unit_rows
from jettclip.profiling import count_parameters, example_image, example_text, longest_text

LENGTHS = (1, 20, 77, 248)
"""Tokens of the captions with which a text tower is checked, where its context allows them."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST_FILE = 2_000_000_000  # bytes; protobuf holds 2 GiB. The weights of larger towers stand beside the file


class ImageEncoder(nn.Module):
    """Images to unit features."""

    def __init__(self, model: TwoTowers) -> None:
        super().__init__()
        self.tower = model.visual
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", model.mean)
        self.register_buffer("std", model.std)

    def forward(self, image: Tensor) -> Tensor:
        """Embeds RGB images in 0..1, float [b, 3, H, W], as [b, D]; nobody has to know how to normalise them."""
        return unit_rows(self.tower((image - self.mean) / self.std))


class TextEncoder(nn.Module):
    """Captions to unit features."""

    def __init__(self, model: TwoTowers) -> None:
        super().__init__()
        self.tower = model.text

    def forward(self, text: Tensor) -> Tensor:
        """Embeds captions, ids int64 [b, L], or embeddings float [b, width] for an adapter, as [b, D]."""
        return unit_rows(self.tower(text))


def export_onnx(model: TwoTowers, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Writes ``image.onnx`` and ``text.onnx`` of the reparameterised copy.

    Returns:
        how far onnxruntime's features differ from the model's, the inputs, S = exp(logit_scale), and SigLIP's bias.
    """
    folded = reparameterize(model)
    longest = longest_text(model)
    image, text = example_image(model, 3), example_text(model, min(20, longest), 3)
    axes = {0: "batch"} if model.embedding_width else {0: "batch", 1: "length"}
    run_image = _write(ImageEncoder(folded), "image", image, {0: "batch"}, folder)
    run_text = _write(TextEncoder(folded), "text", text, axes, folder)
    theirs = Encoders(lambda normalised: run_image(normalised * model.std + model.mean), run_text)
    return {
        "largest_difference": compare(model, theirs, [length for length in LENGTHS if length <= longest]),
        "image_input": f"float32 [batch, {', '.join(map(str, image.shape[1:]))}], RGB in 0..1",
        "text_input": f"float32 [batch, {text.shape[1]}]" if model.embedding_width else "int64 [batch, length]",
        "logit_scale": float(model.logit_scale.detach().exp()),
        **({} if model.logit_bias is None else {"logit_bias": float(model.logit_bias.detach())}),
    }


def check_onnx(model: TwoTowers, config: ModelConfig) -> None:
    """Raises ValueError if a package is missing; every model can be written."""
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}; run: pip install {' '.join(missing)}")


def _write(
    encoder: nn.Module, name: str, example: Tensor, axes: dict[int, str], folder: Path
) -> Callable[[Tensor], Tensor]:
    """Writes an encoder as ``<name>.onnx``, its input of that name; returns what onnxruntime makes of it."""
    import onnxruntime

    path = folder / f"{name}.onnx"
    torch.onnx.export(
        encoder.eval(),
        (example,),
        path,
        input_names=[name],
        output_names=["features"],
        dynamic_shapes={name: axes},
        external_data=4 * count_parameters(encoder) > _LARGEST_FILE,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])
