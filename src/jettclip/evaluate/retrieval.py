"""Image-text retrieval: how often the right one is among the first k."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from jettclip.ranks import rank_and_world_size

RANKS = (1, 5, 10)


def recall(queries: Tensor, gallery: Tensor, first: int = 0, step: int = 1, chunk: int = 1024) -> Tensor:
    """Returns the sums over queries of recall at 1, 5 and 10; query i belongs to gallery item i.

    Ties are broken at random, in expectation: features collapsed to one point score chance, not 1, and so do features
    that are not numbers.

    Args:
        queries: float [N, D].
        gallery: float [N, D].
        first, step: take only the queries first, first + step, ...
        chunk: queries compared with the gallery at once.

    Returns:
        float64 [3].
    """
    hits = torch.zeros(len(RANKS), dtype=torch.float64, device=queries.device)
    ranks = torch.tensor(RANKS, dtype=torch.float64, device=queries.device)
    for targets in torch.arange(len(queries), device=queries.device)[first::step].split(chunk):
        scores = queries[targets] @ gallery.T
        right = scores.gather(1, targets.unsqueeze(1))
        better = (scores > right).sum(dim=1, dtype=torch.float64)
        worse = (scores < right).sum(dim=1, dtype=torch.float64)
        tied = len(gallery) - better - worse  # the right one itself, and whatever is not a number
        hits += ((ranks - better.unsqueeze(1)) / tied.unsqueeze(1)).clamp(0, 1).sum(dim=0)
    return hits


def retrieval_metrics(image: Tensor, text: Tensor) -> dict[str, float]:
    """Computes recall both ways for matching rows; in a process group, each rank answers a share of the queries.

    Args:
        image, text: float [N, D], the same on every rank.
    """
    rank, world_size = rank_and_world_size()
    hits = torch.stack([recall(image, text, rank, world_size), recall(text, image, rank, world_size)])
    if world_size > 1:
        dist.all_reduce(hits)
    names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in RANKS]
    return dict(zip(names, (hits / len(image)).flatten().tolist(), strict=True))


def gather_uneven(rows: Tensor) -> Tensor:
    """Returns all ranks' rows [N, D], which may differ in number; no gradient."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)
    padded = torch.zeros(most, rows.shape[1], dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])
