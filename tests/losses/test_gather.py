from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jettclip.losses.gather import (
    gather_ids,
    gather_rows,
    is_distributed,
    max_over_ranks,
    row_offset,
    sum_over_ranks,
    sum_rows_over_ranks,
)
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


def reduced_on_a_rank() -> dict[str, Tensor]:
    rank = dist.get_rank()
    numbers = torch.tensor([[1.0, -2.0, 3.0], [5.0, 7.0, -1.0]]).T * (1 - rank)  # not contiguous
    before = numbers.clone()
    result = {"sum": sum_over_ranks(numbers), "max": max_over_ranks(numbers)}
    assert torch.equal(numbers, before)
    return result | {"ids": gather_ids(torch.tensor([[rank, 2**40 + rank]]))}


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_largest_and_ids_are_the_same_on_every_rank(world_size: int) -> None:
    numbers = torch.tensor([[1.0, -2.0, 3.0], [5.0, 7.0, -1.0]]).T
    each = torch.stack([numbers * (1 - rank) for rank in range(world_size)])
    for result in run_ranks(world_size, reduced_on_a_rank):
        torch.testing.assert_close(result["sum"], each.sum(dim=0))
        assert torch.equal(result["max"], each.amax(dim=0))
        assert torch.equal(result["ids"], torch.tensor([[rank, 2**40 + rank] for rank in range(world_size)]))


def test_one_process_sums_nothing_up() -> None:
    numbers = torch.randn(3, requires_grad=True)
    for function in (sum_over_ranks, max_over_ranks):
        assert torch.equal(function(numbers), numbers)
        assert not function(numbers).requires_grad
    ids = torch.tensor([[1, 2]])
    assert gather_ids(ids) is ids


def rows_summed_on_a_rank(world_size: int) -> dict[str, Tensor]:
    rank = dist.get_rank()
    rows = (torch.arange(world_size * ROWS * 2.0).view(-1, 2) * 10.0**rank).requires_grad_()
    own = sum_rows_over_ranks(rows)
    ((rank + 1) * own).sum().backward()
    return {"own": own.detach(), "gradient": rows.grad}


def test_a_rank_gets_the_sum_of_its_rows_and_gives_back_their_gradient() -> None:
    whole = torch.arange(2 * ROWS * 2.0).view(-1, 2) * 11
    for rank, result in enumerate(run_ranks(2, rows_summed_on_a_rank, 2)):
        assert torch.equal(result["own"], whole[rank * ROWS : (rank + 1) * ROWS])
        assert torch.equal(result["gradient"], torch.tensor([1.0] * ROWS + [2.0] * ROWS)[:, None].expand(-1, 2))
