"""By how much teachers differ among themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jettclip.losses.pairwise.block import Block
from jettclip.losses.pairwise.exp_sums import LogTotals
from jettclip.losses.pairwise.tiles import similarities, tiles


def disagreement(
    teachers: Sequence[Block], log_totals: Sequence[LogTotals], height: int, buffers: Sequence[Tensor]
) -> Tensor:
    """Returns the mean over teachers of the divergence from one's probabilities to their average, in float64.

    By so much is the mean of their divergences from the student larger than that of their average.

    Args:
        teachers: similarities of the same rows.
        log_totals: what makes probabilities of each teacher's.
        height: rows of a tile.
        buffers: five tiles' room, overwritten.
    """
    total = buffers[0].new_zeros((), dtype=torch.float64)
    block = teachers[0]
    for tile in tiles(block, height):
        theirs, logs, probabilities, *averages = (buffer[: tile.height] for buffer in buffers)
        for index, (teacher, softmax) in enumerate(zip(teachers, log_totals, strict=True)):
            similarities(teacher, tile, theirs)
            for average, log_total in zip(averages, softmax.of(tile), strict=True):
                torch.sub(theirs, log_total, out=logs)
                torch.exp(logs, out=probabilities)
                average.copy_(probabilities) if index == 0 else average.add_(probabilities)
                total += logs.mul_(probabilities).sum() / len(teachers)
        for average in averages:
            average.div_(len(teachers))
            total -= torch.clamp(average, min=torch.finfo(average.dtype).tiny, out=logs).log_().mul_(average).sum()
    return total / (2 * len(block.rows))
