"""Asks models about every sample of a data set, shard by shard, and writes their answers to feature stores."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from jettclip.data.counts import DataError, check_drop_rate, describe
from jettclip.data.features import store_path
from jettclip.data.shards import find_shards
from jettclip.data.store_group import check_places
from jettclip.data.workers import run_workers
from jettclip.extract.members import Member, describe_members
from jettclip.extract.reader import NOT_DRAWN, Chunk, Drawing, QuestionReader, ShardChunks, share
from jettclip.extract.rows import ShardRows, State, Wanted, state_of
from jettclip.openclip import get_autocast
from jettclip.settings import SampleSettings
from jettclip.types import VIEWS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}

T = TypeVar("T")


class Extraction(NamedTuple):
    """What an extraction did."""

    samples: int  # rows written
    shards: int  # stores written
    kept: int  # stores that were there already
    dropped: Counter[str]  # samples without a row, by reason
    damaged: Counter[str]  # irregularities of shards, by kind
    noted: Counter[str]  # what loses nothing, such as captions cut to the tokens that a model reads
    size: int  # bytes of the stores written
    seconds: float  # that asking and writing took
    unread: int = 0  # of the stores kept, those whose shard has no manifest to hold them against

    def describe(self) -> str:
        """Puts it into words."""
        parts = [
            f"{self.samples} samples in {self.shards} shards written, {self.kept} shards kept; "
            f"dropped {describe(self.dropped)}"
        ]
        if self.samples:
            rate, size = self.samples / max(self.seconds, 1e-9), self.size / self.samples
            parts.append(f"{rate:.1f} samples/s, {size:.0f} bytes a sample")
        more = {"damage": self.damaged, "noted": self.noted}
        parts += [f"{what}: {describe(counts)}" for what, counts in more.items() if counts]
        if self.unread:
            parts.append(
                f"{self.unread} of the stores kept were not held against their shards, which have no manifest: where "
                "images or captions have changed, give --overwrite"
            )
        return "; ".join(parts)


def extract_features(
    members: Sequence[Member],
    settings: SampleSettings,
    urls: str | Sequence[str],
    name: str,
    *,
    views: Sequence[str] = VIEWS,
    drawing: Drawing = NOT_DRAWN,
    folder: str = "",
    batch_size: int = 64,
    workers: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
) -> Extraction:
    """Writes the store `name` of every shard; those that hold what is asked for, of these models, are kept.

    Captions of a kept store are held against nothing, and images only where the shard has a manifest.

    The rows of a shard stay in memory until it is whole, those of `workers` shards at once: 0.9 GB for each shard of
    10,000 samples with 30 augmentations of width 1,536 in bf16, twice that for fp32 and for int8, which is made of it;
    and as much again for the shard that is being written.

    Args:
        members: the models to ask, whose answers stand side by side in one store, already on `device`.
        settings: where the captions of samples stand, and how images are decoded.
        urls: shards, with braces, joined by ``::``, or a list of such.
        name: of the store; ``--features`` takes it in training, ``--text-embeddings`` one of a language model.
        views: the captions to ask about.
        drawing: of the augmentations to ask about.
        folder: where to write; beside the shards if empty.
        batch_size: images, or captions, that a model sees at once.
        workers: loader processes; each reads whole shards.
        dtype: to store the features in.
        precision: to compute in, ``fp32`` or ``amp_bf16``.
        device: where to compute.
        rank, world_size: this process takes its share of the shards.
        overwrite: write all stores anew, as after a change of images or captions.

    Raises:
        DataError: if shards are missing, too many of their samples cannot be used, or a store cannot be written, or
            one is there that is of other models, data or captions.
        ValueError: if an image transform does not fit augmentations.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size} must be at least 1")
    reader = QuestionReader(settings, views, [member.preparation(settings) for member in members], drawing)
    found = find_shards(urls, allow_pipe=settings.allow_pipe_urls)
    check_places([shard.url for shard in found], folder)
    once = {shard.url: shard for shard in found}  # some may be named twice, to be seen more often in training
    shards = share(list(once.values()), world_size)[rank]
    info = describe_members(members, settings, precision=precision, augmentation=drawing.describe())
    places = {shard.url: store_path(shard.url, name, folder) for shard in shards}
    wanted = Wanted(info, {*(["image"] if reader.images else []), *views}, dtype)
    states = {
        shard.url: State.WRITE if overwrite else state_of(places[shard.url], shard.url, wanted) for shard in shards
    }
    todo = [shard for shard in shards if states[shard.url] is State.WRITE]
    unread = list(states.values()).count(State.UNREAD)
    autocast = get_autocast(precision, torch.device(device).type)
    _make_folders([places[shard.url] for shard in todo])
    chunks = ShardChunks(todo, reader, max(1, batch_size // max(1, drawing.augmentations)))
    samples = written = size = 0
    dropped, damaged, noted = Counter[str](), Counter[str](), Counter[str]()
    start = time.monotonic()
    with tqdm(total=sum(shard.size for shard in todo), desc=f"extracting {name}", unit="sample", disable=None) as bar:
        answers = _ask(members, run_workers(chunks, min(workers, len(todo))), batch_size, dtype, device, autocast)
        for shard, rows in _gather(_one_behind(answers), bar):
            dropped.update(rows.dropped)
            damaged.update(rows.damaged)
            noted.update(rows.noted)
            if rows.keys:
                rows.write(places[shard], info, dtype)
                samples, written = samples + len(rows.keys), written + 1
                size += os.path.getsize(places[shard])
            else:
                logging.warning(f"{shard} has no usable sample, so it gets no store")
    check_drop_rate(samples, dropped, settings.max_drop_rate)
    kept, seconds = len(shards) - len(todo), time.monotonic() - start
    return Extraction(samples, written, kept, dropped, damaged, noted, size, seconds, unread)


def _ask(
    members: Sequence[Member],
    chunks: Iterable[Chunk],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Iterator[tuple[Chunk, dict[str, Tensor]]]:
    """Yields the chunks with what the models say of them, still on the device, where they may still be at work."""
    kept = torch.float32 if dtype == torch.int8 else dtype  # a store's integers are made of the rows as they are

    def answer(ask: list[Callable[[Tensor], Tensor]], questions: list[Tensor]) -> Tensor:
        with torch.inference_mode(), autocast():
            rows = [
                torch.cat([embed(some.to(device, non_blocking=True)) for some in tensor.split(batch_size)])
                for embed, tensor in zip(ask, questions, strict=True)
            ]
            return torch.cat(rows, dim=1).to(kept)

    for chunk in chunks:
        features = {
            view: answer([member.embed_captions for member in members], tokens)
            for view, tokens in chunk.captions.items()
        }
        if chunk.images:
            features["image"] = answer([member.embed_images for member in members], chunk.images)
        yield chunk, features


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yields what is given, each when the next is there, so that a GPU has work while its last answers are fetched."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def _gather(answers: Iterable[tuple[Chunk, dict[str, Tensor]]], bar: tqdm) -> Iterator[tuple[str, ShardRows]]:
    """Yields each shard with its rows, as soon as it is whole."""
    unfinished: dict[str, ShardRows] = defaultdict(ShardRows)
    for chunk, features in answers:
        unfinished[chunk.shard].add(chunk, features)
        bar.update(len(chunk.info.keys))
        if chunk.is_last:
            yield chunk.shard, unfinished.pop(chunk.shard)


def _make_folders(paths: Iterable[str]) -> None:
    """Makes the folders of files that are to be written, before anyone works hours for them.

    Raises:
        DataError: if that is not possible, or they cannot be written to.
    """
    for folder in sorted({os.path.dirname(path) or "." for path in paths}):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder!r} cannot be made ({error}); choose another --features-dir") from error
        if not os.access(folder, os.W_OK):
            raise DataError(f"{folder!r} cannot be written to; choose another --features-dir")
