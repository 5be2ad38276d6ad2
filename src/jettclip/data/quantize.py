"""Features as 8-bit integers: one byte a number, and one scale a vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEVELS = 127
"""Largest integer; -128 is not used, so that a vector and its negative are stored alike."""

LARGEST_SCALE = torch.finfo(torch.float32).max / (LEVELS + 1)
"""Of a vector that is finite; so that the products with integers of 8 bits are, too."""


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds every vector to integers of up to 127, in units of its largest magnitude over 127.

    No number is off by more than half a unit. A vector that is not finite gets a scale that is not finite, by which
    readers know it.

    Args:
        rows: float [..., D].

    Returns:
        int8 [..., D], and the unit of each vector, float32 [...]; a vector of zeros has 0.
    """
    rows = rows.float()
    scales = rows.abs().amax(dim=-1) / LEVELS
    integers = (rows / scales.unsqueeze(-1)).nan_to_num(0.0)  # 0 / 0 in a vector of zeros
    return integers.round().clamp(-LEVELS, LEVELS).to(torch.int8), scales


def dequantize(rows: Sequence[bytes], scales: Sequence[float]) -> list[Tensor] | None:
    """Returns what `quantize` rounded, as float32 [D], from the integers of each vector as bytes, and its unit.

    There is None instead if a unit is not one that `quantize` gives to a finite vector.
    """
    if not all(0 <= scale <= LARGEST_SCALE for scale in scales):  # NaN is not, either
        return None
    integers = np.frombuffer(b"".join(rows), np.int8).reshape(len(rows), -1)
    return [*map(torch.from_numpy, integers * np.array(scales, np.float32)[:, None])]
