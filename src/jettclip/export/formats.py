"""The formats a model can be written in."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from jettclip.export.compare import compare, encoders_of
from jettclip.export.to_onnx import check_onnx, export_onnx
from jettclip.export.to_openclip import check_hf, check_openclip, export_hf, export_openclip
from jettclip.models.checkpoints import WEIGHTS, describe, load_weights
from jettclip.models.config import ModelConfig
from jettclip.models.reparameterize import reparameterize
from jettclip.models.two_towers import TwoTowers
from jettclip.profiling import count_parameters, longest_text, tower_latencies


def export_reparameterized(model: TwoTowers, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Writes the folded copy (`reparameterize`), described as it is, which ``--pretrained FOLDER`` takes for inference.

    Returns:
        how far what was written differs, and parameters and latency of both.
    """
    folded = reparameterize(model)
    state = {key: value.contiguous() for key, value in folded.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(state, describe(folded)))
    load_weights(folded, folder / WEIGHTS)
    differences = compare(model, encoders_of(folded), [longest_text(model)])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "largest_difference": differences,
        "parameters": {"trained": count_parameters(model), "reparameterized": count_parameters(folded)},
        "latency_ms": {
            device: tower_latencies(copy.deepcopy(model).to(device), folded.to(device)) for device in devices
        },
    }


def check_reparameterized(model: TwoTowers, config: ModelConfig) -> None:
    """Raises ValueError for a model with nothing to fold."""
    if model.is_reparameterized or not reparameterize(model).is_reparameterized:
        raise ValueError(f"{config.name} has no branches to fold, or no more; choose another --format")


class Format(NamedTuple):
    """How a model is written."""

    check: Callable[[TwoTowers, ModelConfig], None]  # raises ValueError for a model it cannot hold
    write: Callable[[TwoTowers, ModelConfig, Path], dict[str, Any]]  # to a folder; returns a report, for JSON


FORMATS = {
    "openclip": Format(check_openclip, export_openclip),
    "hf": Format(check_hf, export_hf),
    "onnx": Format(check_onnx, export_onnx),
    "reparameterized": Format(check_reparameterized, export_reparameterized),
}
"""The formats by name; each compares what it wrote with the model."""


def export(model: TwoTowers, config: ModelConfig, output: Path, formats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Writes a model in some formats, each to a folder of its name, with what was found in ``report.json``.

    Args:
        model: the model, in evaluation mode on the CPU.
        config: its description.
        output: where to make the folders.
        formats: names in `FORMATS`.

    Returns:
        what was found, by format.

    Raises:
        ValueError: for a folder that is there already, a model that a format cannot hold, or an export that differs
            from the model, which is not kept.
    """
    formats = list(dict.fromkeys(formats))
    for name in formats:
        if (output / name).exists():
            raise ValueError(f"{output / name} is there already; remove it, or choose another --output")
        FORMATS[name].check(model, config)
    reports = {}
    for name in formats:
        partial = output / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            reports[name] = FORMATS[name].write(model, config, partial)
            (partial / "report.json").write_text(json.dumps(reports[name], indent=2) + "\n")
            partial.rename(output / name)
        except BaseException:
            shutil.rmtree(partial)
            raise
    return reports
