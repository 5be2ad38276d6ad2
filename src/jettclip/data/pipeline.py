"""From shards to batches: the list of stages, the loader, the length of an epoch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from jettclip.data.collate import collate
from jettclip.data.counts import DataError, Tally, describe
from jettclip.data.plan import Division, Slice, divide, drawn_with_replacement, stretch
from jettclip.data.sample import Sample, SampleReader, TeacherTokenizer, Tokenizer
from jettclip.data.shards import Shard, find_shards
from jettclip.data.store_group import StoreGroup, check_width, open_stores
from jettclip.data.streams import read_shard
from jettclip.data.workers import run_workers
from jettclip.settings import DataSettings
from jettclip.types import AdapterInfo, Batch, BatchInfo, TeacherInfo

SHUFFLE_START = 1000  # samples in the shuffle buffer before the first one leaves it, as in OpenCLIP


class ShardPipeline(IterableDataset):  # type: ignore[type-arg]
    """What runs in a loader worker: reads its piece of the epoch and yields ``(Batch, BatchInfo)``.

    In evaluation, where dropped samples are not replaced, the batch is None if no sample is left for it.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        reader: SampleReader,
        division: Division,
        *,
        collate: Callable[[list[Sample]], Batch],
        settings: DataSettings,
        resampled: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.shards, self.reader, self.division, self.collate = shards, reader, division, collate
        self.settings, self.resampled, self.seed = settings, resampled, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Batch | None, BatchInfo]]:
        info = get_worker_info()
        worker = info.id if info else 0
        tally = Tally(self.settings.max_drop_rate)
        place = f"{self.seed} {self.epoch} {self.division.rank} {worker}"
        groups = wds.DataPipeline(
            partial(self._slices, worker, place),  # Slice: which samples of which shard
            partial(self._groups, tally),  # {"__key__": str, "__shard__": str, "jpg": bytes, ...}
            self._shuffle(random.Random(place)),
        )
        samples = iter(
            wds.DataPipeline(
                groups.repeat() if self.division.is_train else groups,  # from the start again, in place of dropped ones
                partial(self.reader.read_groups, epoch=self.epoch, tally=tally),  # Sample
            )
        )
        for _ in range(self.division.batches_of(worker)):
            rows = list(islice(samples, self.division.batch_size))
            if self.division.is_train and len(rows) < self.division.batch_size:
                raise DataError(f"no usable sample is left: {describe(tally.dropped)}")
            batch = self.collate(rows) if rows else None
            yield batch, tally.since_last([sample.key for sample in rows])

    def _slices(self, worker: int, place: str) -> Iterator[Slice]:
        if self.resampled:
            return drawn_with_replacement(self.shards, place)
        seed = self.seed if self.division.is_train else None
        return stretch(self.shards, *self.division.piece(self.epoch, worker), seed)

    def _groups(self, tally: Tally, slices: Iterator[Slice]) -> Iterator[dict[str, Any]]:
        for shard, first, stop in slices:
            read, count = 0, None if stop is None else stop - first
            at_end = stop == shard.size
            groups = read_shard(shard.url, self.reader.wanted, tally, first, None if at_end else stop)
            for group in islice(groups, count):
                read += 1
                if at_end and read == count and next(groups, None) is not None:
                    tally.damage("shard holds more samples than it did when counted", shard.url)
                yield group
            if count is not None and read < count:
                tally.lose("shard holds fewer samples than it did when counted", shard.url, count - read)
            if count is None and read == 0:
                tally.drop("shard holds no samples", shard.url)

    def _shuffle(self, generator: random.Random) -> Any:
        if not self.division.is_train or self.settings.shuffle_buffer <= 1:
            return None  # the stage is left out
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


def get_wds_dataset(
    settings: DataSettings,
    urls: str | Sequence[str],
    preprocess: Callable[[Image.Image], Tensor],
    tokenizer: Tokenizer | None,
    *,
    is_train: bool,
    batch_size: int,
    views: Sequence[str] = ("short", "long"),
    teacher_parts: Sequence[str] = ("image", "short", "long"),
    teacher_tokenizers: Sequence[TeacherTokenizer] = (),
    adapter: AdapterInfo | None = None,
    crop_captions: bool = False,
    num_samples: int | None = None,
    resampled: bool = False,
    weights: str | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> Loader:
    """Builds the loader of a data set in webdataset shards.

    It yields ``Batch(image, short_caption, long_caption, teacher)``. The order is a function of seed, epoch, rank and
    number of workers.

    Args:
        settings: caption fields, feature stores, limits.
        urls: shards, with braces, joined by ``::``, or a list of such.
        preprocess: PIL image to uint8 or float tensor [3, H, W].
        tokenizer: caption to token ids [1, L]; None where `settings` say that captions are stored embeddings.
        is_train: shuffled full batches, the same number on every rank; otherwise every sample once, in order.
        batch_size: rows of a batch on this rank.
        views: the captions to read, of ``short`` and ``long``.
        teacher_parts: what to read from the feature stores that `settings` names, or to ask teachers of.
        teacher_tokenizers: of teachers that are asked in training, whose token ids the batch then carries in place of
            stored features.
        adapter: what reads stored embeddings, whose width they must have; any width will do if it is None.
        crop_captions: crop token ids to the longest caption of the batch; exact for towers whose embedding does not
            depend on padding.
        num_samples: samples of an epoch, over all ranks; the whole data set by default, and at most in evaluation.
        resampled: draw the shards with replacement, by weight, in training.
        weights: one number a source, separated by ``::``, for `resampled`.
        workers: loader processes; 0 reads in this one.
        rank, world_size: which share of the data this process reads.
        seed: of the order and of the random transform.

    Raises:
        DataError: if shards or stores are missing, hold less than one batch a rank, or embeddings of another width.
        ValueError: if `teacher_parts` names a view that is not read, or there is no tokenizer for captions of text.
    """
    resampled = resampled and is_train
    shards = find_shards(urls, weights, resampled=resampled, allow_pipe=settings.allow_pipe_urls)
    open_stores_of = partial(
        open_stores,
        [shard.url for shard in shards],
        folder=settings.features_dir,
        on_missing=settings.on_missing_features,
    )
    stores: StoreGroup | None = None
    embeddings: StoreGroup | Literal["members"] | None = "members" if settings.text_embeddings == "members" else None
    unread = sorted({*teacher_parts} - {"image", *views})
    if unread and (settings.feature_stores or teacher_tokenizers):
        raise ValueError(f"teacher_parts {unread} need captions that views {[*views]} leaves out; add them there")
    if settings.feature_stores and teacher_parts:
        stores = open_stores_of(settings.feature_stores)
    if settings.text_embeddings and not embeddings:
        embeddings = open_stores_of([settings.text_embeddings])
        if adapter:
            check_width(embeddings, adapter)
    reader = SampleReader(
        settings,
        preprocess,
        tokenizer,
        tuple(views),
        stores=stores,
        teacher_parts=tuple(teacher_parts),
        embeddings=embeddings,
        seed=seed,
        teacher_tokenizers=teacher_tokenizers,
        adapter=adapter,
    )
    dataset = ShardPipeline(
        shards,
        reader,
        divide(sum(shard.size for shard in shards), num_samples, batch_size, is_train, rank, world_size, workers),
        collate=partial(
            collate,
            crop_captions=crop_captions and not settings.text_embeddings,
            crop_teachers=[teacher.crop for teacher in teacher_tokenizers],
        ),
        settings=settings,
        resampled=resampled,
        seed=seed,
    )
    return Loader(dataset, workers, stores.teachers if stores else [])


def _together(first: BatchInfo, second: BatchInfo) -> BatchInfo:
    sums = (dict(Counter(a) + Counter(b)) for a, b in zip(first[1:], second[1:], strict=True))
    return BatchInfo(first.keys + second.keys, *sums)
