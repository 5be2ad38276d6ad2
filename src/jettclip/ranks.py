"""Which of the processes of a run this is, and what they agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Returns this process's rank and the number of processes: 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Averages a tensor over all ranks, which must all ask; on one, returns it."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def holds_on_all_ranks(condition: Tensor) -> bool:
    """Tells whether a condition, bool 0-D, holds on every rank; all of them must ask."""
    flag = condition.to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
