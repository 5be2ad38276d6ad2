from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jettclip.losses.gather import gather_rows, is_distributed, row_offset
from support import run_ranks

ROWS = 2


def everything(world_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = world_size * ROWS
    return {name: torch.randn(rows, width, generator=generator) for name, width in (("one", 3), ("other", 5))}


def gathered_on_a_rank(world_size: int) -> dict[str, Any]:
    mine = slice(row_offset(ROWS), row_offset(ROWS) + ROWS)
    local = {name: rows[mine].clone().requires_grad_() for name, rows in everything(world_size).items()}
    everywhere = gather_rows(local)
    weight = 10.0 ** dist.get_rank()  # every rank asks something else of every row
    sum((weight * rows.square() / 2).sum() for rows in everywhere.values()).backward()
    return {
        "everywhere": {name: rows.detach() for name, rows in everywhere.items()},
        "gradient": {name: rows.grad for name, rows in local.items()},
        "constant": gather_rows({"one": local["one"].detach()})["one"].requires_grad,
        "offset": mine.start,
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_come_in_the_order_of_the_ranks_with_the_gradient_of_all_ranks(world_size: int) -> None:
    whole = everything(world_size)
    asked = sum(10.0**rank for rank in range(world_size))
    for rank, result in enumerate(run_ranks(world_size, gathered_on_a_rank, world_size)):
        assert result["offset"] == rank * ROWS
        assert not result["constant"]
        for name, rows in whole.items():
            assert torch.equal(result["everywhere"][name], rows)
            mine = rows[rank * ROWS : (rank + 1) * ROWS]
            torch.testing.assert_close(result["gradient"][name], asked * mine)


def test_one_process_keeps_its_rows() -> None:
    rows = {"one": torch.randn(3, 2, requires_grad=True)}
    assert gather_rows(rows) is rows
    assert not is_distributed()
    assert row_offset(3) == 0
