"""Decides which samples of which shard a worker reads in an epoch.

All epochs together read one endless stream: pass after pass over the data set, the shards in a fresh order each
time. Epoch e, of n samples, is the stretch [e n, (e+1) n) of it; ranks and their workers take equal, adjacent pieces.
So every rank has the same number of steps however uneven the shards are, a pass sees each sample exactly once, and what
an epoch leaves over at its end is where the next one begins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jettclip.data.counts import DataError
from jettclip.data.shards import Shard


class Slice(NamedTuple):
    """The samples with index `first` to `stop` of a shard; `stop` None means to its end."""

    shard: Shard
    first: int
    stop: int | None


@dataclass(frozen=True)
class Division:
    """How an epoch is divided over batches, ranks and workers.

    In training every rank has the same number of full batches, a multiple of those of a step. In evaluation each sample
    is read once, the last batch of a worker may be small, and ranks differ by one sample at most.
    """

    samples: int  # of an epoch, over all ranks
    batch_size: int  # of a rank
    is_train: bool
    rank: int = 0
    world_size: int = 1
    workers: int = 1  # of a rank
    accumulated: int = 1  # batches of a rank in a training step

    @property
    def batches(self) -> int:
        """Batches of this rank in an epoch."""
        if self.is_train:
            return self.samples // (self.batch_size * self.world_size * self.accumulated) * self.accumulated
        return sum(self.batches_of(worker) for worker in range(self.workers))

    def batches_of(self, worker: int) -> int:
        """Returns how many of them a worker makes; the DataLoader takes them from its workers in turn."""
        if self.is_train:
            return len(range(worker, self.batches, self.workers))
        first, stop = self.piece(0, worker)
        return -(-(stop - first) // self.batch_size)

    def piece(self, epoch: int, worker: int) -> tuple[int, int]:
        """Returns the bounds, in the stream of all epochs, of what one of this rank's workers reads in an epoch."""
        if not self.is_train:
            first, stop = share(self.samples, self.world_size, self.rank)
            low, high = share(stop - first, self.workers, worker)
            return first + low, first + high
        before = (epoch * self.world_size + self.rank) * self.batches + sum(map(self.batches_of, range(worker)))
        return before * self.batch_size, (before + self.batches_of(worker)) * self.batch_size


def divide(
    available: int,
    asked: int | None,
    batch_size: int,
    is_train: bool,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    accumulated: int = 1,
) -> Division:
    """Divides an epoch of the samples asked for, by default of all that are available; of no more in evaluation.

    Raises:
        DataError: if there are too few for every rank to have a step in training, or a sample in evaluation.
    """
    samples = (asked if is_train else min(asked or available, available)) or available
    needed = batch_size * world_size * accumulated if is_train else world_size
    if samples < needed:
        raise DataError(
            f"{samples} samples are too few for {world_size} ranks, which need {needed} "
            f"({_batches(accumulated, batch_size) if is_train else 'one sample'} each): use a smaller --batch-size "
            f"or {'--accum-freq, or ' if accumulated > 1 else ''}fewer ranks, or give the length of an epoch with "
            "--train-num-samples"
        )
    return Division(samples, batch_size, is_train, rank, world_size, max(1, workers), accumulated)


def _batches(count: int, size: int) -> str:
    return f"{count} batches of {size}" if count > 1 else f"a batch of {size}"


def stretch(shards: Sequence[Shard], start: int, stop: int, seed: int | None) -> Iterator[Slice]:
    """Yields the slices of samples `start` to `stop` of the stream; with no seed the shards keep their order."""
    samples_in_pass = sum(shard.size for shard in shards)
    position = start - start % samples_in_pass
    while position < stop:
        order = list(range(len(shards)))  # a source of rows makes each shard when its turn comes
        if seed is not None:
            random.Random(f"{seed} pass {position // samples_in_pass}").shuffle(order)
        for shard in map(shards.__getitem__, order):
            first, last = max(start - position, 0), min(stop - position, shard.size)
            if first < last:
                yield Slice(shard, first, last)
            position += shard.size


def drawn_with_replacement(shards: Sequence[Shard], seed: str) -> Iterator[Slice]:
    """Yields whole shards for ever, drawn by weight with replacement, as OpenCLIP's ``--dataset-resampled`` does."""
    generator = random.Random(seed)
    weights = [shard.weight for shard in shards]
    while True:
        yield Slice(generator.choices(shards, weights)[0], 0, None)


def share(count: int, parts: int, index: int) -> tuple[int, int]:
    """Splits `count` things into adjacent parts that differ by one at most; returns the bounds of part `index`."""
    return count * index // parts, count * (index + 1) // parts
