"""Turns one group of tar members into one training sample; the only file that knows how its parts belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from PIL import Image
from torch import Tensor

from jettclip.data.augmentation import replay
from jettclip.data.captions import Caption, CaptionReader, Field
from jettclip.data.counts import DataError, Dropped, Tally
from jettclip.data.decode import IMAGE_EXTENSIONS, TURNED, decode_vector
from jettclip.data.embedding_tars import EmbeddingTars
from jettclip.data.images import ImageReader, image_size
from jettclip.data.policies import pad_shift
from jettclip.data.store_group import Rows, StoreGroup
from jettclip.data.streams import read_shard
from jettclip.identity import number_of
from jettclip.seeding import generator_of
from jettclip.settings import SampleSettings
from jettclip.types import VIEWS, AdapterInfo, TeacherFeatures, TeacherInfo, TeacherTokens

T = TypeVar("T")

Group = Mapping[str, Any]
"""The members of one sample by extension, ``{"__key__": str, "__shard__": str, "jpg": bytes, ...}``."""

Tokenizer = Callable[[str], Tensor]
"""A caption to token ids int64 [1, L], as every tokenizer of OpenCLIP does.

One that counts the captions it has cut, in an attribute ``truncated`` as `CachedTokenizer` does, has them noted.
"""


class TeacherTokenizer(NamedTuple):
    """How a teacher that is asked in training reads captions."""

    tokenize: Tokenizer
    crop: bool = False  # to the longest caption of a batch; exact for a teacher that ignores padding


class FeatureSource(Protocol):
    """Where the stored answers of teachers come from: stores beside the shards, or members of the samples."""

    has_augmentations: bool
    sees_upright: bool  # whether the teachers saw images turned as their EXIF data says
    members: frozenset[str]

    @property
    def teachers(self) -> list[TeacherInfo]:
        """The teachers, as the loss must know them."""

    def lookup(self, group: Group, contents: Mapping[str, bytes | Caption], pick: Callable[[int], int]) -> Rows:
        """Returns the features of one sample, for the parts in `contents`, and the augmentation they belong to."""


class Sample(NamedTuple):
    """One image with its captions, ready to be collated."""

    key: str
    image: Tensor  # uint8 or float [3, H, W]
    short: Tensor | None  # token ids int64 [L], or an embedding float [D]
    long: Tensor | None  # the same
    teacher: TeacherFeatures | TeacherTokens | None  # rows [Dt], or token ids [L]
    contents: Mapping[str, bytes | str]  # what all that was made of: the encoded image, and the captions

    @property
    def image_number(self) -> int:
        """The number of the encoded image, equal for equal ones."""
        data = self.contents["image"]
        assert isinstance(data, bytes)
        return number_of(data)


AHEAD = 128
"""Samples whose captions and stored features are read before the first of their images is decoded.

Decoding an image empties the processor's caches of the tokenizer's words and the stores' keys, so that in turn with
images these take three times as long.
"""


class Beside(NamedTuple):
    """What stands beside the image of a sample, or why it cannot be used."""

    captions: Mapping[str, Caption] | None  # None if they are the problem
    texts: Mapping[str, Tensor]
    rows: Rows | None
    tokens: TeacherTokens | None
    problem: Exception | None


class SampleReader:
    """Decodes tar groups into samples.

    What is drawn at random is a function of seed, epoch and key, the same on any rank and worker.

    Args:
        settings: where captions stand, what to do without them, and how images are decoded.
        transform: PIL image to tensor, random or not.
        tokenizer: caption to token ids; None where captions are stored embeddings.
        views: the caption views to read, ``short`` and ``long``; a sample without one of them is dropped.
        stores: teacher features to join, if any. Where they belong to stored augmentations, one of those takes the
            place of `transform`.
        teacher_parts: what to take of them, of ``image``, ``short``, ``long``; or which views to ask teachers of.
        embeddings: stores whose ``short`` and ``long`` rows take the place of token ids; ``members``, if the caption
            members hold raw float32 that does; or tars beside the shards that have such members.
        seed: of what is drawn at random.
        teacher_tokenizers: of the teachers to ask in training, in place of `stores`.
        adapter: what reads the embeddings; members of another width are dropped.
        fields: where the captions of a view stand, in place of what `settings` says.
        sequential: take the stored augmentations in turn, one an epoch, instead of at random.

    Raises:
        ValueError: if captions are text and there is no tokenizer, or stored augmentations cannot take the place of
            this `transform`.
    """

    def __init__(
        self,
        settings: SampleSettings,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Tokenizer | None,
        views: tuple[str, ...],
        stores: FeatureSource | None = None,
        teacher_parts: tuple[str, ...] = (),
        embeddings: StoreGroup | EmbeddingTars | Literal["members"] | None = None,
        seed: int = 0,
        teacher_tokenizers: Sequence[TeacherTokenizer] = (),
        adapter: AdapterInfo | None = None,
        fields: Mapping[str, Field] | None = None,
        sequential: bool = False,
    ) -> None:
        if tokenizer is None and embeddings is None:
            raise ValueError("captions of text need a tokenizer; give one, or say where their embeddings are stored")
        self.settings, self.tokenizer, self.views = settings, tokenizer, views
        self.stores, self.teacher_parts, self.embeddings, self.seed = stores, teacher_parts, embeddings, seed
        self.teacher_tokenizers, self.adapter, self.sequential = teacher_tokenizers, adapter, sequential
        self.images = ImageReader(transform, decoder=settings.image_decoder, max_pixels=settings.max_image_pixels)
        self.captions = CaptionReader(
            settings, views, seed=seed, embedded=embeddings == "members" or isinstance(embeddings, EmbeddingTars),
            fields=fields,
        )  # fmt: skip
        self.wanted = frozenset(IMAGE_EXTENSIONS) | self.captions.members
        if stores is not None:
            self.wanted |= stores.members
            if stores.has_augmentations:
                self.replayed_size, self.replayed_by = self.images.size, self.images.interpolation
                if self.images.extra_steps:
                    raise ValueError(
                        "stored augmentations take the place of the image transform, which would also do "
                        f"{', '.join(self.images.extra_steps)}; leave that out of --aug-cfg"
                    )

    def read_shards(self, urls: Iterable[str], tally: Tally) -> Iterator[Sample]:
        """Yields all samples of some shards, in order; those that cannot be used are counted in `tally`.

        Raises:
            DataError: if a shard cannot be opened, or too many samples cannot be used.
        """
        for url in urls:
            yield from self.read_groups(read_shard(url, self.wanted, tally), 0, tally)

    def read_groups(self, groups: Iterable[Group], epoch: int, tally: Tally) -> Iterator[Sample]:
        """Yields the samples that groups of tar members make; those that cannot be used are counted in `tally`.

        Raises:
            DataError: if there are too many of them.
        """
        groups = iter(groups)
        while ahead := list(islice(groups, AHEAD)):
            beside = iter([self._beside(group, epoch, tally) for group in ahead])

            def finish(group: Group, beside: Iterator[Beside] = beside) -> Sample:
                return self._sample(group, next(beside), epoch, tally)

            yield from usable(ahead, finish, tally)

    def read(self, group: Group, epoch: int, tally: Tally) -> Sample:
        """Decodes one group of tar members.

        Raises:
            Dropped: with the reason, if something is missing, empty, stale or unreadable.
        """
        return self._sample(group, self._beside(group, epoch, tally), epoch, tally)

    def _beside(self, group: Group, epoch: int, tally: Tally) -> Beside:
        """Reads what stands beside the image; a problem is kept for when the sample's turn comes."""
        captions: Mapping[str, Caption] | None = None
        texts: dict[str, Tensor] = {}
        rows: Rows | None = None
        tokens: TeacherTokens | None = None
        problem: Exception | None = None
        try:
            data = image_bytes(group)
            captions = self.captions.read(self._group_of_captions(group), epoch, tally)
            texts = {view: self._encode(group, epoch, view, captions[view], tally) for view in self.views}
            if self.stores is not None:
                rows = self._rows(group, epoch, {"image": data, **captions})
            elif self.teacher_tokenizers:
                tokens = TeacherTokens(*(self._teacher_tokens(view, captions, tally) for view in VIEWS))
        except (Dropped, DataError) as found:
            problem = found
        return Beside(captions, texts, rows, tokens, problem)

    def _sample(self, group: Group, beside: Beside, epoch: int, tally: Tally) -> Sample:
        """Decodes the image, and puts what stands beside it to it."""
        if beside.captions is None:
            assert beside.problem is not None
            raise beside.problem
        key, data = group["__key__"], image_bytes(group)
        turned = tally.noted[TURNED]
        # before a problem with the rest, since a store has no row for a sample whose image cannot be decoded
        image = self.images.decode(data, tally)
        if self.stores is not None and not self.stores.sees_upright and tally.noted[TURNED] > turned:
            raise Dropped("image is turned, and its stored augmentations were drawn for it as it lies")
        if beside.problem is not None:
            raise beside.problem
        augmentation = beside.rows.augmentation if beside.rows is not None else None
        if augmentation is None:
            pixels = self.images.transform(image, f"{self.seed} {epoch} {key}")
        else:
            if augmentation.drawn_for is None:
                tally.note("size of the image at generation is not stored, the augmentations must fit")
            augmentation.check(image_size(image))
            pixels = replay(image, augmentation.augmentation, self.replayed_size, self.replayed_by)
        teacher = beside.rows.features if beside.rows is not None else beside.tokens
        contents = {"image": data, **{view: caption.text for view, caption in beside.captions.items()}}
        return Sample(key, pixels, beside.texts.get("short"), beside.texts.get("long"), teacher, contents)

    def _group_of_captions(self, group: Group) -> Group:
        if not isinstance(self.embeddings, EmbeddingTars):
            return group
        named = {name: value for name, value in group.items() if name.startswith("__")}
        return {**named, **self.embeddings.members_of(group)}

    def _rows(self, group: Group, epoch: int, contents: Mapping[str, bytes | Caption]) -> Rows:
        def pick(count: int) -> int:
            if self.sequential:
                return epoch % count
            return generator_of(self.seed, epoch, group["__key__"], "augmentation").randrange(count)

        assert self.stores is not None
        return self.stores.lookup(group, {part: contents[part] for part in self.teacher_parts}, pick)

    def _encode(self, group: Group, epoch: int, view: str, caption: Caption, tally: Tally) -> Tensor:
        """Returns a caption's token ids [L], or its embedding [D]."""
        if isinstance(caption.text, bytes):
            vector = decode_vector(caption.text)
            if self.adapter and len(vector) != self.adapter.width:
                raise Dropped(
                    f"{view} embedding is of another width",
                    f"{len(vector)} among the members, and {self.adapter.model} reads {self.adapter.width}; choose the "
                    "--model for that width",
                )
            return vector
        if isinstance(self.embeddings, StoreGroup):
            row: Tensor = getattr(self.embeddings.lookup(group, {view: caption}, lambda _: 0).features, view)
            return row.float()
        if self.tokenizer is None:
            raise Dropped(f"{view} caption is missing", f"{caption.place} holds text, where an embedding should be")
        ids = tokenize(self.tokenizer, caption.text, f"{view} caption", tally)
        if view == "short" and self.settings.shifts_pads:
            return pad_shift(ids, generator_of(self.seed, epoch, group["__key__"], "pad-shift"))
        return ids

    def _teacher_tokens(self, view: str, captions: Mapping[str, Caption], tally: Tally) -> list[Tensor]:
        if view not in self.teacher_parts:
            return []
        text = captions[view].text
        assert isinstance(text, str)
        return [
            tokenize(teacher.tokenize, text, f"{view} caption for a teacher", tally)
            for teacher in self.teacher_tokenizers
        ]


def usable(groups: Iterable[Group], read: Callable[[Group], T], tally: Tally) -> Iterator[T]:
    """Yields what `read` makes of each group; those it raises `Dropped` for are counted in `tally`, and left out.

    Raises:
        DataError: if there are too many of them.
    """
    for group in groups:
        try:
            made = read(group)
        except Dropped as problem:
            tally.drop(problem.reason, f"sample {group['__key__']} of {group['__shard__']} ({problem})")
            continue
        tally.keep()
        yield made


def image_bytes(group: Group) -> bytes:
    """Returns the encoded image of a group.

    Raises:
        Dropped: if it has none.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in group:
            data: bytes = group[extension]
            return data
    members = ", ".join(sorted(name for name in group if not name.startswith("__")))
    found = f"it has {members or 'none of the members read'}"
    raise Dropped("image is missing", f"{group['__image__']} cannot be read" if "__image__" in group else found)


def tokenize(tokenizer: Tokenizer, caption: str, what: str, tally: Tally) -> Tensor:
    """Returns a caption's token ids [L]; that it was cut is noted, if the tokenizer counts what it cuts."""
    truncated = getattr(tokenizer, "truncated", 0)
    ids = tokenizer(caption)[0]
    if getattr(tokenizer, "truncated", 0) > truncated:
        tally.note(f"{what} truncated to {len(ids)} tokens")
    return ids
