"""What the tiled terms share: similarities made a few rows at a time, in buffers that are used again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from jettclip.losses.pairwise.block import Block, Positives
from jettclip.types import at_least_float32

TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Size of a tile: on a CPU a few of them stay in the cache, on a GPU a tile keeps it busy for longer than a launch."""

FEWEST_ROWS = 128
"""Fewer rows a tile make matrix products slow: 64 cost a quarter more time than 256 at B = 4096 on a CPU."""


class Tile:
    """Some rows' similarities to all columns.

    Attributes:
        rows: which rows of the rank.
        own: which columns belong to them, one each.
        height: how many rows.
    """

    def __init__(self, first: int, after: int, offset: int) -> None:
        self.rows = slice(first, after)
        self.own = slice(first + offset, after + offset)
        self.height = after - first

    def own_entries(self, similarities: Tensor) -> Tensor:
        """Returns the entries of rows and their own columns, a view [rows]."""
        return similarities[:, self.own].diagonal()

    def belongs(self, positives: Positives) -> Tensor:
        """Tells which columns belong to which rows, bool [rows, B]."""
        pairs = zip(positives.rows[self.rows].unbind(dim=1), positives.columns.unbind(dim=1), strict=True)
        equal = [row.unsqueeze(1) == column for row, column in pairs]
        return torch.stack(equal).any(dim=0) if len(equal) > 1 else equal[0]


def tiles(block: Block, rows_each: int) -> Iterator[Tile]:
    """Walks over the rows of a block; the last tile may be smaller."""
    for first in range(0, len(block.rows), rows_each):
        yield Tile(first, min(first + rows_each, len(block.rows)), block.offset)


def tile_height(block: Block, tile: int) -> int:
    """Returns the rows of a tile: `tile`, or what fits into the cache if that is 0, and no more than there are."""
    if tile == 0:
        size = TILE_BYTES.get(block.rows.device.type, TILE_BYTES["cuda"])
        tile = max(FEWEST_ROWS, size // (len(block.columns) * block.rows.element_size()))
    return max(1, min(tile, len(block.rows)))


def similarities(block: Block, tile: Tile, buffer: Tensor) -> Tensor:
    """Fills the first rows of a buffer [tile height, B] with similarities, and returns them.

    Results are written to a given place throughout the tiled terms, which saves memory, and keeps autocast away, too.
    """
    rows = block.rows[tile.rows] * block.scale
    return torch.mm(rows, block.columns.T, out=buffer[: len(rows)])


def precise(block: Block, dtype: torch.dtype | None = None) -> Block:
    """Returns a block in float32 at least, or in the given type, whose scale is a tensor [1]."""
    rows = at_least_float32(block.rows) if dtype is None else block.rows.to(dtype)
    scale = block.scale.to(rows) if isinstance(block.scale, Tensor) else rows.new_full((1,), block.scale)
    return Block(rows, block.columns.to(rows.dtype), scale, block.offset)
