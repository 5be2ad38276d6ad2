"""What the contrastive term's softmax is compared with: who belongs together, and label smoothing."""

from __future__ import annotations

from torch import Tensor

from jettclip.losses.pairwise.block import Positives
from jettclip.losses.pairwise.tiles import Tile


class Belonging:
    """The similarities of what belongs together, summed over rows and over columns.

    Attributes:
        row_sums, row_counts: of the columns that belong to a row [b].
        column_sums, column_counts: of the rows that belong to a column, of this rank [B].
    """

    def __init__(self, like: Tensor, rows: int, columns: int, positives: Positives | None) -> None:
        self.positives = positives
        self.row_sums, self.row_counts = like.new_zeros(2, rows)
        self.column_sums, self.column_counts = like.new_zeros(2, columns)

    def add(self, tile: Tile, entries: Tensor, work: Tensor) -> None:
        """Adds a tile [rows, B]; `work` is as large, and overwritten."""
        if self.positives is None:
            self.row_sums[tile.rows] = self.column_sums[tile.own] = tile.own_entries(entries)
            self.row_counts[tile.rows] = self.column_counts[tile.own] = 1
            return
        work.copy_(tile.belongs(self.positives))
        self.row_counts[tile.rows] = work.sum(dim=1)
        self.column_counts += work.sum(dim=0)
        work.mul_(entries)
        self.row_sums[tile.rows] = work.sum(dim=1)
        self.column_sums += work.sum(dim=0)

    def subtract(self, tile: Tile, weight: Tensor, smoothing: float, gradient: Tensor, work: Tensor) -> None:
        """Subtracts `weight` times the targets of rows and of columns from a tile's gradient; overwrites `work`."""
        if smoothing > 0:
            gradient.sub_(weight * (2 * smoothing / gradient.shape[1]))
        if self.positives is None:
            tile.own_entries(gradient).sub_(weight * (2 * (1 - smoothing)))
            return
        work.copy_(tile.belongs(self.positives))
        share = (1 - smoothing) * weight
        for counts in (self.row_counts[tile.rows].unsqueeze(1), self.column_counts):
            gradient.addcmul_(work, share / counts, value=-1)
