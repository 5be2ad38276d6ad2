"""Stretches a table of learned text positions to a longer context."""

from __future__ import annotations

import torch
from torch import Tensor

KEEP = 20
"""Rows that keep their place: most captions CLIP was trained on are no longer (arXiv 2403.15378, section 3.2)."""


def stretch_positions(table: Tensor, length: int, keep: int = KEEP) -> Tensor:
    """Stretches position embeddings by Long-CLIP's knowledge-preserving rule (arXiv 2403.15378, equation 3).

    The first `keep` rows stay; the others are spread over the rest of the new length by linear interpolation, the last
    ones, past the end of the old table, by linear extrapolation. In closed form, new row j reads the old table at

        s(j) = j                                if j < keep
        s(j) = keep + (j - keep) / ratio        else, with ratio = (length - keep) / (rows - keep)

    which is ratio 4 for 77 -> 248 (CLIP) and for 64 -> 196 (SigLIP) with 20 rows kept.

    Args:
        table: float [rows, width].
        length: rows wanted, at least as many as there are.
        keep: rows that keep their place, at least 1 and fewer than there are.

    Returns:
        float [length, width], in the table's dtype.

    Raises:
        ValueError: if `length` or `keep` does not fit the table.
    """
    rows = table.shape[0]
    if length < rows:
        raise ValueError(
            f"positions for {rows} tokens cannot be stretched to {length}; "
            f"use a model with a context length of {rows} or more"
        )
    if not 1 <= keep < rows - 1:
        raise ValueError(f"keep={keep} leaves nothing to stretch of {rows} positions; it must be 1 to {rows - 2}")
    if length == rows:
        return table.clone()
    ratio = (length - keep) / (rows - keep)
    target = torch.arange(length, dtype=torch.float64, device=table.device)
    source = torch.where(target < keep, target, keep + (target - keep) / ratio)
    below = source.floor().clamp(max=rows - 2).long()  # past the end, the last two rows set the slope
    weight = (source - below).unsqueeze(1)
    precise = table.to(torch.float64)
    return ((1 - weight) * precise[below] + weight * precise[below + 1]).to(table.dtype)
