"""Stretches a table of learned text positions to a longer context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEEP = 20
"""Rows that keep their place: most captions CLIP was trained on are no longer (arXiv 2403.15378, section 3.2)."""


def stretch_positions(
    table: Tensor, length: int, keep: int = KEEP, ratio: float | None = None, tail: str = "extrapolate"
) -> Tensor:
    """Stretches position embeddings by Long-CLIP's knowledge-preserving rule (arXiv 2403.15378, equation 3).

    The first `keep` rows stay; the others are spread out by `ratio`, with linear interpolation between them. In closed
    form, new row j reads the old table at

        s(j) = j                                if j < keep
        s(j) = keep + (j - keep) / ratio        else

    By default the ratio is the one that fills the new length. With the tail ``extrapolate``, Long-CLIP's, as many new
    rows follow the last old one as lie between two others, by linear extrapolation; that is ratio 4 for 77 -> 248
    (CLIP) and for 64 -> 196 (SigLIP) with 20 rows kept. With ``interpolate``, the last new row is the last old one;
    that is ratio 4 for 77 -> 248 with 19 rows kept, the variant of JettCLIP's report (github.com/Phrandime/JettCLIP).

    Args:
        table: float [rows, width].
        length: rows wanted, at least as many as there are.
        keep: rows that keep their place, at least 1 and fewer than there are.
        ratio: new rows for each old one past `keep`.
        tail: ``extrapolate`` or ``interpolate``.

    Returns:
        float [length, width], in the table's dtype; a copy of the table if it has that length.

    Raises:
        ValueError: if `length`, `keep`, `ratio` or `tail` does not fit the table.
    """
    rows = table.shape[0]
    if length < rows:
        raise ValueError(
            f"positions for {rows} tokens cannot be stretched to {length}; "
            f"use a model with a context length of {rows} or more"
        )
    if length == rows:
        return table.clone()
    if not 1 <= keep < rows - 1:
        raise ValueError(
            f"--position-keep {keep} leaves nothing to stretch of {rows} positions; it must be 1 to {rows - 2}"
        )
    if tail not in ("extrapolate", "interpolate"):
        raise ValueError(f"--position-tail {tail!r} must be extrapolate or interpolate")
    last = 0 if tail == "extrapolate" else 1
    if ratio is None:
        ratio = (length - last - keep) / (rows - last - keep)
    if not 0 < ratio < math.inf:
        raise ValueError(f"--position-ratio {ratio:g} must be positive, such as 4")
    target = torch.arange(length, dtype=torch.float64, device=table.device)
    source = torch.where(target < keep, target, keep + (target - keep) / ratio)
    if tail == "interpolate" and float(source[-1]) > rows - 1 + 1e-9:
        least = math.ceil(1e4 * (length - 1 - keep) / (rows - 1 - keep)) / 1e4
        raise ValueError(
            f"--position-ratio {ratio:g} runs past the last of {rows} positions at {length} tokens, which "
            f"--position-tail interpolate forbids; give {least} or more, or extrapolate"
        )
    below = source.floor().clamp(max=rows - 2).long()  # past the end, the last two rows set the slope
    weight = (source - below).unsqueeze(1)
    precise = table.to(torch.float64)
    return ((1 - weight) * precise[below] + weight * precise[below + 1]).to(table.dtype)
