"""Softmax over the rows and over the columns of a matrix that comes in tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jettclip.losses.gather import max_over_ranks, sum_over_ranks
from jettclip.losses.pairwise.tiles import Tile


class ExpSums:
    """Sums of exp(s) along one axis, less by the largest s so far (online softmax, arXiv 1805.02867).

    Attributes:
        maximum: the largest s [n].
        total: the sum of exp(s - maximum) [n].
        weighted: the sum of exp(s - maximum) * weight [n], if there are weights.
    """

    def __init__(self, like: Tensor, count: int, is_weighted: bool) -> None:
        self.maximum = like.new_full((count,), -math.inf)
        self.total = like.new_zeros(count)
        self.weighted = like.new_zeros(count) if is_weighted else None

    def add(self, where: slice, tile: Tensor, axis: int, weight: Tensor | None, work: Tensor) -> None:
        """Adds a tile along `axis` to the sums at `where`; `work` is as large as the tile, and overwritten."""
        before = self.maximum[where]
        maximum = torch.maximum(before, tile.amax(axis))
        decay = (before - maximum).exp()
        torch.sub(tile, maximum.unsqueeze(axis), out=work).exp_()
        self.total[where] = self.total[where] * decay + work.sum(axis)
        if self.weighted is not None and weight is not None:
            self.weighted[where] = self.weighted[where] * decay + work.mul_(weight).sum(axis)
        self.maximum[where] = maximum

    def log_total(self) -> Tensor:
        """Returns the log-sum-exp, in float64."""
        return self.maximum.double() + self.total.double().log()

    def mean_weight(self) -> Tensor:
        """Returns the mean weight under the softmax, in float64."""
        assert self.weighted is not None
        return self.weighted.double() / self.total.double()


class StreamedSoftmax:
    """The softmax of a matrix over its rows, and over its columns, which go on over all ranks."""

    def __init__(self, like: Tensor, rows: int, columns: int, *, is_weighted: bool = False) -> None:
        self.rows, self.columns = (ExpSums(like, count, is_weighted) for count in (rows, columns))

    def add(self, tile: Tile, entries: Tensor, work: Tensor, weight: Tensor | None = None) -> None:
        """Adds a tile [rows, B] to the sums; `work` is as large, and overwritten."""
        self.rows.add(tile.rows, entries, 1, weight, work)
        self.columns.add(slice(None), entries, 0, weight, work)

    def log_totals(self) -> LogTotals:
        """Returns what makes probabilities of the matrix, once it was added whole."""
        return LogTotals(*(sums.log_total().to(sums.total.dtype) for sums in (self.rows, self.columns)))


class LogTotals(NamedTuple):
    """The log-sum-exp of the rows, and of the columns, of a matrix."""

    rows: Tensor  # [b]
    columns: Tensor  # [B]

    def of(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Returns what is subtracted from a tile's entries before exp, for softmax over rows and over columns."""
        return self.rows[tile.rows].unsqueeze(1), self.columns

    def probabilities(self, tile: Tile, entries: Tensor, out: Tensor) -> Tensor:
        """Returns the sum of softmax over rows and softmax over columns; overwrites the entries."""
        row, column = self.of(tile)
        torch.sub(entries, row, out=out).exp_()
        return out.add_(entries.sub_(column).exp_())


def sum_columns_over_ranks(matrices: Sequence[StreamedSoftmax], others: Sequence[Tensor]) -> None:
    """Completes the columns of matrices, of which each rank has seen its own rows only, in two exchanges.

    Args:
        matrices: to complete, in place.
        others: sums [B] that travel along and are completed in place, too.
    """
    sums = [matrix.columns for matrix in matrices]
    maxima = max_over_ranks(torch.stack([one.maximum for one in sums]))
    numbers = [*others]
    for one, maximum in zip(sums, maxima, strict=True):
        decay = (one.maximum - maximum).exp()
        one.maximum = maximum
        for total in (one.total, one.weighted):
            if total is not None:
                numbers.append(total.mul_(decay))
    for local, complete in zip(numbers, sum_over_ranks(torch.stack(numbers)), strict=True):
        local.copy_(complete)
