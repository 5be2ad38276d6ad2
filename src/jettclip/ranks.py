"""Which of the processes of a run this is."""

from __future__ import annotations

import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """Returns this process's rank and the number of processes: 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
