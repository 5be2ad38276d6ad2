"""Fills feature stores: asks a teacher about every sample once, and keeps the answers beside the shards."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from jettclip.data.collate import collate
from jettclip.data.counts import Dropped, Tally
from jettclip.data.features import Store, StoreInfo, digest, store_path, write_store
from jettclip.data.sample import Sample, SampleReader
from jettclip.data.shards import find_shards, open_shard
from jettclip.data.tar import read_samples
from jettclip.models.teacher import Teacher
from jettclip.types import Batch, BatchInfo, to_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Chunk(NamedTuple):
    """Consecutive samples of one shard."""

    shard: str
    batch: Batch | None  # None if the end of the shard brings no more samples
    digests: dict[str, list[bytes]]  # of image, short and long caption
    info: BatchInfo
    is_last: bool


class ShardChunks(IterableDataset[Chunk]):
    """Reads whole shards in order, each by one worker; every sample once."""

    def __init__(self, shards: Sequence[str], reader: SampleReader, batch_size: int, crop_captions: bool) -> None:
        super().__init__()
        self.shards, self.reader, self.batch_size, self.crop_captions = shards, reader, batch_size, crop_captions

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for shard in self.shards[worker::workers]:
            yield from self._chunks(shard)

    def _chunks(self, shard: str) -> Iterator[Chunk]:
        tally = Tally(self.reader.settings.max_drop_rate)
        samples: list[Sample] = []
        digests: dict[str, list[bytes]] = defaultdict(list)

        def chunk(is_last: bool) -> Chunk:
            batch = collate(samples, self.crop_captions) if samples else None
            return Chunk(shard, batch, dict(digests), tally.since_last([s.key for s in samples]), is_last)

        with open_shard(shard) as stream:
            for group in read_samples(stream, self.reader.wanted, tally, shard):
                try:
                    contents = self.reader.contents(group, tally)
                    samples.append(self.reader.decode(group["__key__"], shard, contents, epoch=0))
                except Dropped as problem:
                    tally.drop(problem.reason, f"{group['__key__']} of {shard} ({problem})")
                    continue
                tally.keep()
                for part, content in contents.items():
                    digests[part].append(digest(content))
                if len(samples) == self.batch_size:
                    yield chunk(is_last=False)
                    samples, digests = [], defaultdict(list)
        yield chunk(is_last=True)


class Extraction(NamedTuple):
    """What an extraction did."""

    samples: int  # rows written
    shards: int  # stores written
    kept: int  # stores that were there already
    dropped: Counter[str]  # samples without a row, by reason


@dataclass
class _Rows:
    """What is known of a shard so far."""

    keys: list[str] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    digests: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))


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
    """Writes the store `name` of every shard; those that are there and of this teacher are kept.

    Args:
        teacher: the model to ask, already on `device`.
        reader: reads the samples with the teacher's own image transform and tokenizer.
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
    shards = find_shards(urls, allow_pipe=reader.settings.allow_pipe_urls)
    info = StoreInfo(
        model=teacher.name,
        weights_digest=teacher.weights_digest(),
        logit_scale=teacher.info.logit_scale,
        normalized=True,
        preprocess=teacher.preprocess,
        width=teacher.info.width,
    )
    ours = shards[rank::world_size]
    todo = [shard for shard in ours if overwrite or not _is_current(store_path(shard.url, name, folder), info)]
    samples = written = 0
    dropped: Counter[str] = Counter()
    chunks = ShardChunks([shard.url for shard in todo], reader, batch_size, teacher.model.ignores_padding)
    rows: dict[str, _Rows] = defaultdict(_Rows)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with tqdm(total=sum(shard.size for shard in todo), desc=f"extracting {name}", unit="sample", disable=None) as bar:
        for chunk in DataLoader(chunks, batch_size=None, num_workers=min(workers, len(todo))):
            shard = rows[chunk.shard]
            dropped.update(chunk.info.dropped)
            if chunk.batch is not None:
                features = teacher(to_device(chunk.batch, torch.device(device)))
                shard.keys += chunk.info.keys
                for part, digests in chunk.digests.items():
                    shard.features[part].append(getattr(features, part).to("cpu", dtype))
                    shard.digests[part] += digests
                bar.update(len(chunk.info.keys))
            if chunk.is_last:
                if shard.keys:
                    _write(store_path(chunk.shard, name, folder), shard, info)
                    samples, written = samples + len(shard.keys), written + 1
                else:
                    logging.warning(f"{chunk.shard} has no usable sample, so it gets no store")
                del rows[chunk.shard]
    return Extraction(samples, written, len(ours) - len(todo), dropped)


def _write(path: str, rows: _Rows, info: StoreInfo) -> None:
    write_store(path, rows.keys, {part: torch.cat(parts) for part, parts in rows.features.items()}, rows.digests, info)


def _is_current(path: str, info: StoreInfo) -> bool:
    """Tells whether a store is there and of this teacher; whether its rows still fit is checked when they are read."""
    try:
        return Store(path).info == info
    except Dropped:
        return False
