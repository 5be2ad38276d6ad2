"""What loader workers do for an extraction: every sample once, with all its captions, under all augmentations.

Training takes one caption and one augmentation of a sample an epoch (`jettclip.data.sample`); a store must have them
all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.transforms import InterpolationMode

from jettclip.data.augmentation import Augmentation, draw, dump, replay
from jettclip.data.captions import Caption, CaptionReader
from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import IMAGE_EXTENSIONS
from jettclip.data.features import digest
from jettclip.data.images import ImageReader, image_size
from jettclip.data.sample import Group, image_bytes, tokenize, usable
from jettclip.data.shards import Shard
from jettclip.data.streams import read_shard
from jettclip.extract.members import Preparation
from jettclip.seeding import generator_of
from jettclip.settings import SampleSettings
from jettclip.types import BatchInfo

SCALE, RATIO, OPERATIONS, MAGNITUDE, CROP_SIZE = (0.08, 1.0), (3 / 4, 4 / 3), 2, 9, 224
"""Of the augmentations, as DataCompDR's were drawn (arXiv 2311.17049)."""


class Drawing(NamedTuple):
    """How the augmentations of an extraction are drawn.

    Translations are a share of a crop of 224 pixels, whatever size a teacher reads, as DataCompDR's are
    (arXiv 2311.17049): so the same augmentations serve several teachers. They are replayed in pixels, so that a
    smaller image is moved by more of its width, and a larger one by less.
    """

    augmentations: int = 0  # of every image; 0 for the teacher's own evaluation transform
    seed: int = 0

    def describe(self) -> str:
        """Returns what a store says of it, as JSON; nothing for the evaluation transform."""
        if not self.augmentations:
            return ""
        how = {"scale": SCALE, "ratio": RATIO, "operations": OPERATIONS, "magnitude": MAGNITUDE, "crop_size": CROP_SIZE}
        return json.dumps({"augmentations": self.augmentations, "seed": self.seed, **how})

    def draw(self, key: str, size: tuple[int, int]) -> list[Augmentation]:
        """Draws the augmentations of one image, a function of seed, key and number, the same for all teachers."""
        how = SCALE, RATIO, OPERATIONS, MAGNITUDE, (CROP_SIZE, CROP_SIZE)
        return [draw(size, generator_of(self.seed, key, n, "augmentation"), *how) for n in range(self.augmentations)]


NOT_DRAWN = Drawing()


class Questions(NamedTuple):
    """One sample as the models must see it."""

    key: str
    images: list[Tensor]  # for each model uint8 [A, 3, h, w]; none for models of text
    tokens: dict[str, list[list[Tensor]]]  # by view, for each model and caption
    digests: dict[str, list[bytes]]  # of the image, and of the captions of each view
    augmentations: str  # JSON; empty for the evaluation transform
    image_size: tuple[int, int]


class Chunk(NamedTuple):
    """Consecutive samples of one shard."""

    shard: str
    info: BatchInfo
    images: list[Tensor]  # for each model uint8 [n * A, 3, h, w]; none for models of text
    captions: dict[str, list[Tensor]]  # by view, for each model, those of all n samples one after the other
    counts: dict[str, list[int]]  # by view, of each sample's captions
    digests: dict[str, list[list[bytes]]]  # by part
    augmentations: list[str]
    image_sizes: list[tuple[int, int]]
    is_last: bool = False  # of its shard; it has no samples then


class QuestionReader:
    """Prepares tar groups for the models of an extraction.

    Args:
        settings: where captions stand, what to do without them, and how images are decoded.
        views: the captions to ask about, ``short`` and ``long``; a sample without one of them is dropped.
        preparations: of the models.
        drawing: of the augmentations.

    Raises:
        ValueError: if augmentations are asked for, and an image transform does not tell the size that it makes.
    """

    def __init__(
        self,
        settings: SampleSettings,
        views: Sequence[str],
        preparations: Sequence[Preparation],
        drawing: Drawing = NOT_DRAWN,
    ) -> None:
        self.settings, self.preparations, self.drawing = settings, preparations, drawing
        self.captions = CaptionReader(settings, tuple(views), seed=0, embedded=False)
        self.images = [preparation.images for preparation in preparations if preparation.images is not None]
        self.replays = [(images.size, images.interpolation) for images in self.images] if drawing.augmentations else []
        self.wanted = frozenset(self.captions.members) | frozenset(IMAGE_EXTENSIONS if self.images else ())

    def read(self, group: Group, tally: Tally) -> Questions:
        """Prepares one sample.

        Raises:
            Dropped: with the reason, if something is missing, empty or unreadable.
        """
        captions = self.captions.every(group, tally)
        tokens = {view: self._tokens(view, its_captions, tally) for view, its_captions in captions.items()}
        digests = {view: [digest(caption.text) for caption in its_captions] for view, its_captions in captions.items()}
        images: list[Tensor] = []
        augmentations, size = "", (0, 0)
        if self.images:
            data = image_bytes(group)
            digests["image"] = [digest(data)]
            if self.drawing.augmentations:
                images, augmentations, size = self._augmented(data, group["__key__"], tally)
            else:
                images = [self._plain(reader, data, tally) for reader in self.images]
        return Questions(group["__key__"], images, tokens, digests, augmentations, size)

    def _tokens(self, view: str, captions: Sequence[Caption], tally: Tally) -> list[list[Tensor]]:
        rows = [
            [tokenize(preparation.tokenizer, str(caption.text), f"{view} caption", tally) for caption in captions]
            for preparation in self.preparations
        ]
        if not all(len(row) for its_rows in rows for row in its_rows):
            raise Dropped(f"{view} caption has no token")
        return rows

    @staticmethod
    def _plain(reader: ImageReader, data: bytes, tally: Tally) -> Tensor:
        return reader.transform(reader.decode(data, tally)).unsqueeze(0)

    def _augmented(self, data: bytes, key: str, tally: Tally) -> tuple[list[Tensor], str, tuple[int, int]]:
        """Returns for each model the augmented views [A, 3, h, w], with how they were made and the image's size."""
        image = self.images[0].decode(data, tally)
        drawn = self.drawing.draw(key, image_size(image))
        views: dict[tuple[tuple[int, int], InterpolationMode], Tensor] = {}
        for how in self.replays:
            if how not in views:
                views[how] = torch.stack([replay(image, one, *how) for one in drawn])
        return [views[how] for how in self.replays], dump(drawn), image_size(image)

    def collate(self, shard: str, questions: Sequence[Questions], info: BatchInfo) -> Chunk:
        """Puts the samples of one shard together."""
        captions = {
            view: [
                preparation.stack([row for one in questions for row in one.tokens[view][n]])
                for n, preparation in enumerate(self.preparations)
            ]
            for view in self.captions.views
        }
        return Chunk(
            shard,
            info,
            [torch.cat([one.images[n] for one in questions]) for n in range(len(self.images))],
            captions,
            {view: [len(one.digests[view]) for one in questions] for view in self.captions.views},
            {part: [one.digests[part] for one in questions] for part in questions[0].digests},
            [one.augmentations for one in questions],
            [one.image_size for one in questions],
        )


class ShardChunks(IterableDataset[Chunk]):
    """Reads whole shards in order, each by one worker; every sample once."""

    def __init__(self, shards: Sequence[Shard], reader: QuestionReader, samples: int) -> None:
        super().__init__()
        self.shards, self.reader, self.samples = shards, reader, samples

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        tally = Tally(self.reader.settings.max_drop_rate)

        def read(group: Mapping[str, Any]) -> Questions:
            return self.reader.read(group, tally)

        for shard in share(self.shards, workers)[worker]:
            questions = usable(read_shard(shard.url, self.reader.wanted, tally), read, tally)
            while some := list(islice(questions, self.samples)):
                yield self.reader.collate(shard.url, some, tally.since_last([one.key for one in some]))
            yield Chunk(shard.url, tally.since_last([]), [], {}, {}, {}, [], [], is_last=True)


def share(shards: Sequence[Shard], parts: int) -> list[list[Shard]]:
    """Deals out shards so that every part has about as many samples: the largest first, each to the smallest part."""
    dealt: list[list[Shard]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for shard in sorted(shards, key=lambda shard: -shard.size):
        smallest = sizes.index(min(sizes))
        dealt[smallest].append(shard)
        sizes[smallest] += max(shard.size, 1)
    return dealt
