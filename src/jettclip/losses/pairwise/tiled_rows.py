"""The tiled terms whose tiles need nothing of each other: cross-entropy of rows only, and SigLIP's sigmoid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jettclip.losses.pairwise.block import Block, Positives
from jettclip.losses.pairwise.tiles import Tile, precise, similarities, tile_height, tiles

Compare = Callable[[Tile, Tensor, Tensor], Tensor]
"""Turns a tile's similarities into their gradient, in place, with a buffer as large; returns the tile's value."""


def one_way(block: Block, *, tile: int = 0) -> Tensor:
    """Returns the mean over rows of the cross-entropy with each row's own column.

    Several ranks: as for `softmax_terms`.

    Args:
        block: float [b, d] and [B, d], computed in float32 at least; rows, columns and scale get gradients.
        tile: rows a tile; 0 chooses.
    """
    block = precise(block)
    return _RowTerms.apply(block.rows, block.columns, block.scale, None, _cross_entropy, block.offset, tile)


def sigmoid_term(block: Block, bias: Tensor, *, positives: Positives | None = None, tile: int = 0) -> Tensor:
    """Returns the mean over rows of -sum_j log sigmoid(z_ij (S x_i . y_j + bias)) (SigLIP, arXiv 2303.15343).

    z_ij is 1 for what belongs together, and -1 for all else. Several ranks: as for `softmax_terms`.

    Args:
        block: float [b, d] and [B, d], computed in float32 at least; rows, columns and scale get gradients.
        bias: float [1], of the logits; gets a gradient, too.
        positives: who belongs together; without, a row belongs to its own column only.
        tile: rows a tile; 0 chooses.
    """

    def compare(tile: Tile, logits: Tensor, work: Tensor) -> Tensor:
        if positives is None:
            own = tile.own_entries(logits)
            own.neg_()
        else:
            belongs = tile.belongs(positives)
            work.copy_(belongs).mul_(-2).add_(1)
            logits.mul_(work)
        # now -z times the logit: softplus of it is the loss, its sigmoid the gradient, less the sign
        value = F.softplus(logits, threshold=40).sum(dtype=torch.float64)
        logits.sigmoid_()
        if positives is None:
            own.neg_()
        else:
            logits.mul_(work)
        return value

    block = precise(block)
    return _RowTerms.apply(block.rows, block.columns, block.scale, bias.to(block.rows), compare, block.offset, tile)


def _cross_entropy(tile: Tile, logits: Tensor, work: Tensor) -> Tensor:
    maximum = logits.amax(dim=1)
    margin = maximum - tile.own_entries(logits)
    total = logits.sub_(maximum.unsqueeze(1)).exp_().sum(dim=1)
    logits.div_(total.unsqueeze(1))
    tile.own_entries(logits).sub_(1)
    return (margin.double() + total.double().log()).sum()


class _RowTerms(torch.autograd.Function):
    """The mean over rows of a term; since a tile's gradient needs no other tile, it is made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        compare: Compare,
        offset: int,
        height: int,
    ) -> Tensor:
        block = Block(rows, columns, scale, offset)
        height = tile_height(block, height)
        buffers = rows.new_empty(2, height, len(columns))
        differentiable = any(ctx.needs_input_grad)
        if differentiable:
            grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
            grad_bias = rows.new_zeros((), dtype=torch.float64)
        value = rows.new_zeros((), dtype=torch.float64)
        for tile in tiles(block, height):
            entries = similarities(block, tile, buffers[0])
            if bias is not None:
                entries.add_(bias)
            value += compare(tile, entries, buffers[1, : len(entries)])
            if differentiable:
                torch.mm(entries, columns, out=grad_rows[tile.rows])
                grad_columns.addmm_(entries.T, rows[tile.rows])
                if bias is not None:
                    grad_bias += entries.sum(dtype=torch.float64)
        if differentiable:
            grad_scale = (rows * grad_rows).sum(dtype=torch.float64)
            factor = scale / len(rows)
            ctx.save_for_backward(
                grad_rows.mul_(factor),
                grad_columns.mul_(factor),
                (grad_scale / len(rows)).to(scale).expand_as(scale),
                None if bias is None else (grad_bias / len(rows)).to(bias).expand_as(bias),
            )
        return (value / len(rows)).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if gradient is None else grad * gradient for gradient in ctx.saved_tensors]
        return *gradients, None, None, None
