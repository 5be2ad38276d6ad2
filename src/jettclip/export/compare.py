"""Compares what was exported with the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jettclip.models.two_towers import TwoTowers
from jettclip.profiling import example_image, example_text

TOLERANCE = 1e-4
"""How far a coordinate of a unit feature may lie from the model's."""


class Encoders(NamedTuple):
    """Two towers, from inputs as the model takes them (normalised images) to unit features."""

    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor]


def encoders_of(model: Any) -> Encoders:
    """Returns the towers of a model of ours or OpenCLIP's, in evaluation mode."""
    model.eval()
    return Encoders(
        lambda image: model.encode_image(image, normalize=True), lambda text: model.encode_text(text, normalize=True)
    )


def compare(model: TwoTowers, others: Encoders, lengths: Sequence[int]) -> dict[str, float]:
    """Compares unit features on random images and captions, one and three at a time.

    Args:
        model: the model, in evaluation mode.
        others: what was exported.
        lengths: tokens of the captions; for an adapter, any one.

    Returns:
        the largest absolute difference of a coordinate, by tower.

    Raises:
        ValueError: if one is larger than `TOLERANCE`, or no number.
    """
    ours = encoders_of(model)
    images = [example_image(model, rows) for rows in (1, 3)]
    texts = [example_text(model, length, rows) for length in lengths for rows in (1, 3)]
    with torch.no_grad():
        differences = {
            "image": max(_difference(ours.image, others.image, image) for image in images),
            "text": max(_difference(ours.text, others.text, text) for text in texts),
        }
    for tower, difference in differences.items():
        if difference > TOLERANCE:
            raise ValueError(
                f"the exported {tower} tower differs from the model by {difference:.1e}, more than {TOLERANCE:.0e}; "
                "look for weights that are not finite or of half precision"
            )
    return differences


def _difference(ours: Callable[[Tensor], Tensor], others: Callable[[Tensor], Tensor], value: Tensor) -> float:
    """Returns the largest absolute difference; infinity where one is no number."""
    return float((ours(value) - others(value)).abs().nan_to_num(torch.inf).max())
