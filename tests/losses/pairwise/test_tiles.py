from __future__ import annotations

import pytest
import torch

from jettclip.losses.pairwise.block import Block, Positives
from jettclip.losses.pairwise.tiles import Tile, similarities, tile_height, tiles


def block_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Block:
    return Block(torch.zeros(rows, 1, dtype=dtype), torch.zeros(columns, 1, dtype=dtype), torch.ones(1, dtype=dtype))


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "height"),
    [
        (4096, 4096, torch.float32, 256),  # 4 MiB
        (4096, 4096, torch.float64, 128),
        (4096, 2048, torch.float32, 512),
        (4096, 2**16, torch.float32, 128),  # fewer are slow
        (100, 100, torch.float32, 100),  # no more than there are
        (100, 2**16, torch.float32, 100),
    ],
)
def test_a_tile_fits_into_the_cache(rows: int, columns: int, dtype: torch.dtype, height: int) -> None:
    assert tile_height(block_of(rows, columns, dtype), 0) == height


@pytest.mark.parametrize(("asked", "height"), [(1, 1), (7, 7), (50, 50), (51, 50)])
def test_a_tile_is_as_high_as_asked_for(asked: int, height: int) -> None:
    assert tile_height(block_of(50, 50), asked) == height


def test_a_gpu_gets_larger_tiles() -> None:
    block = Block(*(torch.empty(2**14, 1, device="meta") for _ in range(2)), 1.0)
    assert tile_height(block, 0) == 1024  # 64 MiB


def test_tiles_cover_the_rows_and_their_own_columns() -> None:
    found = list(tiles(block_of(7, 20)._replace(offset=10), 3))
    assert [(tile.rows, tile.own, tile.height) for tile in found] == [
        (slice(0, 3), slice(10, 13), 3),
        (slice(3, 6), slice(13, 16), 3),
        (slice(6, 7), slice(16, 17), 1),
    ]


def test_a_tile_knows_its_entries() -> None:
    torch.manual_seed(1)
    block = Block(torch.randn(4, 5), torch.randn(9, 5), torch.tensor([3.0]), 2)
    tile, buffer = Tile(1, 3, 2), torch.full((3, 9), torch.nan)
    entries = similarities(block, tile, buffer)
    torch.testing.assert_close(entries, 3 * block.rows[1:3] @ block.columns.T)
    assert entries.data_ptr() == buffer.data_ptr()
    assert torch.equal(tile.own_entries(entries), torch.stack([entries[0, 3], entries[1, 4]]))


def test_what_shares_any_number_belongs_together() -> None:
    rows, columns = torch.tensor([[0, 0], [1, 7], [2, 8]]), torch.tensor([[1, 5], [3, 7], [1, 8], [0, 8]])
    belongs = [[True, True, True, False], [False, False, True, True]]
    assert Tile(1, 3, 0).belongs(Positives(rows, columns)).tolist() == belongs
    first = Positives(rows[:, :1], columns[:, :1])
    assert Tile(1, 3, 0).belongs(first).tolist() == [[True, False, True, False], [False] * 4]
