"""The only place where a loss meets the process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from jettclip.ranks import rank_and_world_size


def gather_rows(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns all ranks' rows of several features, in one exchange, with gradient to where each row came from.

    The gradient of a row is the sum of what all ranks ask of it; with each rank's loss a mean over its own rows, the
    mean over ranks that DistributedDataParallel takes is then the gradient of the mean over all rows, exactly.

    Args:
        features: float [b, width] by name, the same names, widths, dtype and b on every rank.

    Returns:
        float [B, width] by name, the rows in the order of the ranks.
    """
    if not features or not is_distributed():
        return features
    rows = _GatherRows.apply(torch.cat(list(features.values()), dim=1))
    widths = [feature.shape[1] for feature in features.values()]
    return dict(zip(features, rows.split(widths, dim=1), strict=True))


def gather_ids(ids: Tensor) -> Tensor:
    """Returns all ranks' identities, int64 [B, n] of this rank's [b, n], in the order of the ranks."""
    return _all_gather(ids) if is_distributed() else ids


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """Returns the sum over the ranks, element by element, without gradient."""
    return _reduce(numbers, dist.ReduceOp.SUM)


def max_over_ranks(numbers: Tensor) -> Tensor:
    """Returns the largest over the ranks, element by element, without gradient."""
    return _reduce(numbers, dist.ReduceOp.MAX)


def sum_rows_over_ranks(rows: Tensor) -> Tensor:
    """Returns this rank's rows [b, width] of the sum over ranks of [B, width], with gradient, as `gather_rows` has."""
    summed: Tensor = _SumRows.apply(rows) if is_distributed() else rows
    return summed


def is_distributed() -> bool:
    """Tells whether there are other ranks."""
    return rank_and_world_size()[1] > 1


def is_first_rank() -> bool:
    """Tells whether this rank is the one to speak for all."""
    return rank_and_world_size()[0] == 0


def row_offset(rows: int) -> int:
    """Returns where this rank's `rows` begin among all ranks' rows."""
    return rank_and_world_size()[0] * rows


def _reduce(numbers: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not is_distributed():
        return numbers.detach()
    result = numbers.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, operation)
    return result


def _all_gather(rows: Tensor) -> Tensor:
    everywhere = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everywhere, rows.contiguous())
    return everywhere


def _reduce_scatter(rows: Tensor) -> Tensor:
    own = rows.new_empty(len(rows) // dist.get_world_size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous())
    return own


class _GatherRows(torch.autograd.Function):
    """All-gather whose gradient is a reduce-scatter; torch has it only deprecated (2.15) or under private names."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _reduce_scatter(grad)


class _SumRows(torch.autograd.Function):
    """Reduce-scatter whose gradient is an all-gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _reduce_scatter(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_gather(grad)
