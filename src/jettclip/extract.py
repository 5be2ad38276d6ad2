"""Fills feature stores: asks a teacher about every sample once, and keeps the answers beside the shards."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from jettclip.data.collate import collate
from jettclip.data.counts import DataError, Dropped, Tally, check_drop_rate
from jettclip.data.features import Store, StoreInfo, digest, store_path, write_store
from jettclip.data.sample import SampleReader
from jettclip.data.shards import find_shards
from jettclip.data.store_group import check_places
from jettclip.data.workers import run_workers
from jettclip.models.teacher import Teacher
from jettclip.types import Batch, BatchInfo, to_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Chunk(NamedTuple):
    """Consecutive samples of one shard."""

    shard: str
    batch: Batch | None  # None at the end of the shard
    digests: dict[str, list[bytes]]  # of image, short and long caption
    info: BatchInfo


class ShardChunks(IterableDataset[Chunk]):
    """Reads whole shards in order, each by one worker; every sample once."""

    def __init__(self, shards: Sequence[str], reader: SampleReader, batch_size: int, crop_captions: bool) -> None:
        super().__init__()
        self.shards, self.reader, self.batch_size, self.crop_captions = shards, reader, batch_size, crop_captions

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        tally = Tally(self.reader.settings.max_drop_rate)
        for shard in self.shards[worker::workers]:
            samples = self.reader.read_shards([shard], tally)
            while rows := list(islice(samples, self.batch_size)):
                digests = {part: [digest(row.contents[part]) for row in rows] for part in rows[0].contents}
                info_of_rows = tally.since_last([row.key for row in rows])
                yield Chunk(shard, collate(rows, self.crop_captions), digests, info_of_rows)
            yield Chunk(shard, None, {}, tally.since_last([]))


class Extraction(NamedTuple):
    """What an extraction did."""

    samples: int  # rows written
    shards: int  # stores written
    kept: int  # stores that were there already
    dropped: Counter[str]  # samples without a row, by reason


@dataclass
class _Rows:
    """The rows of one shard's store."""

    keys: list[str] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    digests: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    dropped: Counter[str] = field(default_factory=Counter)  # samples without a row, by reason

    def write(self, path: str, info: StoreInfo) -> None:
        features = {part: torch.cat(parts) for part, parts in self.features.items()}
        write_store(path, self.keys, features, self.digests, info)


def extract_features(
    teacher: Teacher,
    reader: SampleReader,
    urls: str | Sequence[str],
    name: str,
    *,
    folder: str = "",
    batch_size: int = 64,
    workers: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
) -> Extraction:
    """Writes the store `name` of every shard; those that hold what is asked for, of this teacher, are kept.

    Args:
        teacher: the model to ask, already on `device`.
        reader: reads the samples with the teacher's own image transform and tokenizer; its views are asked about.
        urls: shards, with braces, joined by ``::``, or a list of such.
        name: of the store; ``--features`` takes it in training.
        folder: where to write; beside the shards if empty.
        batch_size: samples the teacher sees at once.
        workers: loader processes; each reads whole shards.
        dtype: to store the features in.
        device: where to compute.
        rank, world_size: this process takes every `world_size`-th shard.
        overwrite: write all stores anew, as after a change of images or captions.

    Raises:
        DataError: if shards are missing, or too many of their samples cannot be used.
    """
    found = find_shards(urls, allow_pipe=reader.settings.allow_pipe_urls)
    check_places([shard.url for shard in found], folder)
    once = {shard.url: shard for shard in found}  # some may be named twice, to be seen more often in training
    shards = list(once.values())[rank::world_size]
    info = StoreInfo(
        model=teacher.name,
        weights_digest=teacher.weights_digest(),
        logit_scale=teacher.info.logit_scale,
        normalized=True,
        preprocess=teacher.preprocess,
        width=teacher.info.width,
    )
    parts = {"image", *reader.views}
    places = {shard.url: store_path(shard.url, name, folder) for shard in shards}
    todo = [shard for shard in shards if overwrite or not _is_current(places[shard.url], info, parts, dtype)]
    chunks = ShardChunks([shard.url for shard in todo], reader, batch_size, teacher.model.ignores_padding)
    samples = written = 0
    dropped: Counter[str] = Counter()
    if folder:
        os.makedirs(folder, exist_ok=True)
    with tqdm(total=sum(shard.size for shard in todo), desc=f"extracting {name}", unit="sample", disable=None) as bar:
        for shard, rows in _ask(teacher, chunks, min(workers, len(todo)), dtype, torch.device(device), bar):
            dropped.update(rows.dropped)
            if rows.keys:
                rows.write(places[shard], info)
                samples, written = samples + len(rows.keys), written + 1
            else:
                logging.warning(f"{shard} has no usable sample, so it gets no store")
    check_drop_rate(samples, dropped, reader.settings.max_drop_rate)
    return Extraction(samples, written, len(shards) - len(todo), dropped)


def _ask(
    teacher: Teacher, chunks: ShardChunks, workers: int, dtype: torch.dtype, device: torch.device, bar: tqdm
) -> Iterator[tuple[str, _Rows]]:
    """Yields each shard with what the teacher says of it, as soon as it is whole."""
    unfinished: dict[str, _Rows] = defaultdict(_Rows)
    for shard, batch, digests, info in run_workers(chunks, workers):
        rows = unfinished[shard]
        rows.dropped.update(info.dropped)
        if batch is None:
            yield shard, unfinished.pop(shard)
            continue
        batch = to_device(batch, device)
        features = teacher(batch.image, batch.short_caption, batch.long_caption)
        rows.keys += info.keys
        for part, its_digests in digests.items():
            rows.features[part].append(getattr(features, part).to("cpu", dtype))
            rows.digests[part] += its_digests
        bar.update(len(info.keys))


def _is_current(path: str, info: StoreInfo, parts: set[str], dtype: torch.dtype) -> bool:
    """Tells whether a store has what is asked for; whether its rows still fit is seen when they are read.

    Raises:
        DataError: if the store would lose rows that nobody asked to lose.
    """
    try:
        store = Store(path)
    except Dropped:
        return False
    if store.info != info or store.dtype != dtype:
        return False
    if not parts <= store.parts and not store.parts <= parts:
        raise DataError(
            f"{path} holds {', '.join(sorted(store.parts))}, and {', '.join(sorted(parts))} are asked for; "
            "ask for all of them at once, or give --overwrite"
        )
    return parts <= store.parts
