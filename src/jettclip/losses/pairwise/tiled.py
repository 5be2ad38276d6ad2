"""The pairwise terms in memory that grows with B rather than B^2.

Similarities are made a tile of rows at a time and thrown away, their log-sum-exp over rows and columns is streamed,
and the backward pass makes them again (compare Inf-CL, arXiv 2410.17243, and FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from jettclip.losses.pairwise.block import Block, Margin, Positives, SoftmaxValues
from jettclip.losses.pairwise.tiled_rows import one_way, sigmoid_term
from jettclip.losses.pairwise.tiled_softmax import Plan, TiledSoftmax
from jettclip.losses.pairwise.tiles import precise, tile_height

__all__ = ["one_way", "sigmoid_term", "softmax_terms"]


def softmax_terms(
    student: Block,
    teachers: Sequence[Block] = (),
    *,
    wanted: Collection[str],
    label_smoothing: float = 0.0,
    positives: Positives | None = None,
    margin: Margin | None = None,
    tile: int = 0,
) -> SoftmaxValues:
    """Compares the softmax over rows and over columns of a similarity matrix with targets.

    With s_ij = S x_i . y_j, n_i the number of columns that belong to row i, e the label smoothing, and q the
    similarities of teacher t, all for rows and likewise for columns, the mean of both directions taken:

    - clip: the cross-entropy with (1 - e) / n_i for what belongs together, plus e / B for all (CLIP, arXiv 2103.00020,
      figure 3).
    - kd: KL(mean over t of softmax(q) || softmax(s)) (MobileCLIP, arXiv 2311.17049, equation 1).
    - crd: the mean over t of KL(softmax(q) || softmax(s)) (CLIP-KD, arXiv 2307.12732). Its gradient is that of kd.

    Several ranks: the means over ranks of the values, and of the gradients of the model's parameters, are those of the
    one global batch, if the columns were gathered by `gather_rows`. Every rank must make the same calls.

    Args:
        student: float [b, d] and [B, d], computed in float32 at least; rows, columns and scale get gradients.
        teachers: of the same rows, of any width each; constants.
        wanted: which of ``clip``, ``kd``, ``crd`` to compute.
        label_smoothing: of clip.
        positives: of clip; without, a row belongs to its own column only.
        margin: of clip; S * weight * t_i . t_j is added to the similarities of what does not belong together, so that
            negatives with like captions count more. The weight is in units of the cosine, this project's reading of
            HN-CLIP (arXiv 2608.18521).
        tile: rows a tile; 0 chooses.

    Returns:
        the terms, zero where not wanted.
    """
    block = precise(student)
    dtype = block.rows.dtype
    with torch.no_grad():
        constants = [precise(teacher, dtype) for teacher in teachers if {"kd", "crd"} & set(wanted)]
        captions = None
        if margin is not None and "clip" in wanted:
            captions = precise(Block(margin.rows, margin.columns, block.scale * margin.weight), dtype)
    plan = Plan(constants, frozenset(wanted), label_smoothing, positives, captions, tile_height(block, tile))
    return SoftmaxValues(*TiledSoftmax.apply(block.rows, block.columns, block.scale, block.offset, plan))
