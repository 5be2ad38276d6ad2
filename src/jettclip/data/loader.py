"""Runs a data set through its stages, in loader processes, epoch by epoch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from jettclip.data.counts import DataError, Tally, describe
from jettclip.data.plan import Division, Slice, drawn_with_replacement, stretch
from jettclip.data.sample import Sample, SampleReader
from jettclip.data.sources import Source
from jettclip.data.workers import run_workers
from jettclip.settings import DataSettings
from jettclip.types import Batch, BatchInfo, TeacherInfo

SHUFFLE_START = 1000  # samples in the shuffle buffer before the first one leaves it, as in OpenCLIP


class ShardPipeline(IterableDataset):  # type: ignore[type-arg]
    """What runs in a loader worker: reads its piece of the epoch and yields ``(Batch, BatchInfo)``.

    In evaluation, where dropped samples are not replaced, the batch is None if no sample is left for it.
    """

    def __init__(
        self,
        source: Source,
        reader: SampleReader,
        division: Division,
        *,
        collate: Callable[[list[Sample]], Batch],
        settings: DataSettings,
        resampled: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.source, self.reader, self.division, self.collate = source, reader, division, collate
        self.settings, self.resampled, self.seed = settings, resampled, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Batch | None, BatchInfo]]:
        info = get_worker_info()
        worker = info.id if info else 0
        tally = Tally(self.settings.max_drop_rate)
        place = f"{self.seed} {self.epoch} {self.division.rank} {worker}"
        if worker == self.division.rank == 0:  # it belongs to no one's piece of the data, so that one of them says it
            tally.damaged.update(self.source.lost)
        groups = wds.DataPipeline(
            partial(self._slices, worker, place),  # Slice: which samples of which shard
            partial(self._groups, tally),  # {"__key__": str, "__shard__": str, "jpg": bytes, ...}
            self._shuffle(random.Random(place)),
        )
        # from the start again, in place of dropped ones
        read = iter(groups.repeat() if self.division.is_train else groups)
        for _ in range(self.division.batches_of(worker)):
            rows = self._rows(read, tally)
            if self.division.is_train and len(rows) < self.division.batch_size:
                raise DataError(f"no usable sample is left: {describe(tally.dropped)}")
            batch = self.collate(rows) if rows else None
            yield batch, tally.since_last([sample.key for sample in rows], [sample.image_number for sample in rows])

    def _rows(self, groups: Iterator[dict[str, Any]], tally: Tally) -> list[Sample]:
        """Returns the samples of a batch; fewer if no group is left."""
        rows: list[Sample] = []
        while ahead := list(islice(groups, self.division.batch_size - len(rows))):
            rows.extend(self.reader.read_groups(ahead, self.epoch, tally))
        return rows

    def _slices(self, worker: int, place: str) -> Iterator[Slice]:
        if self.resampled:
            return drawn_with_replacement(self.source.shards, place)
        seed = self.seed if self.division.is_train else None
        return stretch(self.source.shards, *self.division.piece(self.epoch, worker), seed)

    def _groups(self, tally: Tally, slices: Iterator[Slice]) -> Iterator[dict[str, Any]]:
        for shard, first, stop in slices:
            yield from self.source.read(shard, self.reader.wanted, tally, first, stop)

    def _shuffle(self, generator: random.Random) -> Any:
        if not self.division.is_train or self.settings.shuffle_buffer <= 1 or self.source.row_by_row:
            return None  # the stage is left out; rows were shuffled as shards of their own
        size = self.settings.shuffle_buffer
        return wds.shuffle(size, initial=min(SHUFFLE_START, size), rng=generator)


class Loader:
    """Yields the batches of one epoch; `last_info` says who is in the last one and what was lost around it."""

    def __init__(self, dataset: ShardPipeline, workers: int, teachers: list[TeacherInfo]) -> None:
        self.dataset, self.workers, self.teachers = dataset, workers, teachers
        self.last_info = BatchInfo([], {}, {}, {})

    @property
    def num_batches(self) -> int:
        """Batches of this rank in an epoch."""
        return self.dataset.division.batches

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration reads."""
        self.dataset.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        held: Batch | None = None  # back for one turn: counts without a batch join it
        info = BatchInfo([], {}, {}, {})
        for batch, its_info in run_workers(self.dataset, self.workers):
            if held is None or batch is None:
                held, info = held or batch, _together(info, its_info)
            else:
                self.last_info = info
                yield held
                held, info = batch, its_info
        if held is None:
            raise DataError(f"no sample is usable: {describe(info.dropped)}")
        self.last_info = info
        yield held


def _together(first: BatchInfo, second: BatchInfo) -> BatchInfo:
    dropped, damaged, noted = (dict(Counter(a) + Counter(b)) for a, b in zip(first[1:4], second[1:4], strict=True))
    return BatchInfo(first.keys + second.keys, dropped, damaged, noted, [*first.images, *second.images])
