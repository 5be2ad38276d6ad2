"""Turns one tar group into one training sample; the only file that knows what a sample's members mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor

from jettclip.data.captions import POLICIES, CaptionField
from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import IMAGE_EXTENSIONS, decode_image, decode_vector
from jettclip.data.store_group import StoreGroup
from jettclip.data.streams import read_shard
from jettclip.seeding import seeded
from jettclip.settings import SampleSettings
from jettclip.types import VIEWS, AdapterInfo, TeacherFeatures, TeacherTokens

Tokenizer = Callable[[str], Tensor]
"""A caption to token ids int64 [1, L], as every tokenizer of OpenCLIP does.

One that counts the captions it has cut, in an attribute ``truncated`` as `CachedTokenizer` does, has them noted.
"""


class TeacherTokenizer(NamedTuple):
    """How a teacher that is asked in training reads captions."""

    tokenize: Tokenizer
    crop: bool = False  # to the longest caption of a batch; exact for a teacher that ignores padding


class Sample(NamedTuple):
    """One image with its captions, ready to be collated."""

    key: str
    image: Tensor  # uint8 or float [3, H, W]
    short: Tensor | None  # token ids int64 [L], or an embedding float [D]
    long: Tensor | None  # the same
    teacher: TeacherFeatures | TeacherTokens | None  # rows [Dt], or token ids [L]
    contents: Mapping[str, bytes | str]  # what all that was made of: the encoded image, and the captions


class SampleReader:
    """Decodes tar groups into samples.

    Args:
        settings: where captions stand, and what to do without them.
        transform: PIL image to tensor, random or not.
        tokenizer: caption to token ids; None where captions are stored embeddings.
        views: the caption views to read, ``short`` and ``long``; a sample without one of them is dropped.
        stores: teacher features to join, if any.
        teacher_parts: what to take of them, of ``image``, ``short``, ``long``; or which views to ask teachers of.
        embeddings: stores whose ``short`` and ``long`` rows take the place of token ids; or ``members``, if the
            caption members hold raw float32 that does.
        seed: makes the random transform a function of seed, epoch and key, the same on any rank or worker.
        teacher_tokenizers: of the teachers to ask in training, in place of `stores`.
        adapter: what reads the embeddings; members of another width are dropped.
    """

    def __init__(
        self,
        settings: SampleSettings,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Tokenizer | None,
        views: tuple[str, ...],
        stores: StoreGroup | None = None,
        teacher_parts: tuple[str, ...] = (),
        embeddings: StoreGroup | Literal["members"] | None = None,
        seed: int = 0,
        teacher_tokenizers: Sequence[TeacherTokenizer] = (),
        adapter: AdapterInfo | None = None,
    ) -> None:
        if tokenizer is None and embeddings is None:
            raise ValueError("captions of text need a tokenizer; give one, or say where their embeddings are stored")
        self.settings, self.transform, self.tokenizer, self.views = settings, transform, tokenizer, views
        self.stores, self.teacher_parts, self.embeddings, self.seed = stores, teacher_parts, embeddings, seed
        self.teacher_tokenizers, self.adapter = teacher_tokenizers, adapter
        self.fields = {
            "short": CaptionField(settings.short_caption_field),
            "long": CaptionField(settings.long_caption_field),
        }
        self.wanted = frozenset(IMAGE_EXTENSIONS).union(*(field.members for field in self.fields.values()))

    def read_shards(self, urls: Iterable[str], tally: Tally) -> Iterator[Sample]:
        """Yields all samples of some shards, in order; those that cannot be used are counted in `tally`.

        Raises:
            DataError: if a shard cannot be opened, or too many samples cannot be used.
        """
        for url in urls:
            yield from self.read_groups(read_shard(url, self.wanted, tally), 0, tally)

    def read_groups(self, groups: Iterable[Mapping[str, Any]], epoch: int, tally: Tally) -> Iterator[Sample]:
        """Yields the samples that groups of tar members make; those that cannot be used are counted in `tally`.

        Raises:
            DataError: if there are too many of them.
        """
        for group in groups:
            try:
                sample = self.read(group, epoch, tally)
            except Dropped as problem:
                tally.drop(problem.reason, f"sample {group['__key__']} of {group['__shard__']} ({problem})")
                continue
            tally.keep()
            yield sample

    def read(self, group: Mapping[str, Any], epoch: int, tally: Tally) -> Sample:
        """Decodes one group of tar members.

        Raises:
            Dropped: with the reason, if something is missing, empty, stale or unreadable.
        """
        key, shard = group["__key__"], group["__shard__"]
        contents = self._contents(group, tally)
        # first, since a store has no row for a sample whose image cannot be decoded
        image = decode_image(contents["image"], self.settings.max_image_pixels)
        texts = {view: self._encode(shard, key, view, contents[view], tally) for view in self.views}
        teacher: TeacherFeatures | TeacherTokens | None = None
        if self.stores is not None:
            teacher = self.stores.lookup(shard, key, {part: contents[part] for part in self.teacher_parts})
        elif self.teacher_tokenizers:
            teacher = TeacherTokens(*(self._teacher_tokens(view, contents, tally) for view in VIEWS))
        with seeded(f"{self.seed} {epoch} {key}"):
            pixels = self.transform(image)
        return Sample(key, pixels, texts.get("short"), texts.get("long"), teacher, contents)

    def _contents(self, group: Mapping[str, Any], tally: Tally) -> dict[str, Any]:
        """Finds the encoded ``image`` and the ``short`` and ``long`` captions among the members of a group."""
        image = next((group[extension] for extension in IMAGE_EXTENSIONS if extension in group), None)
        if image is None:
            raise Dropped("image is missing", f"it has {_members(group)}")
        return {"image": image, **{view: self._caption(group, view, tally) for view in self.views}}

    def _caption(self, group: Mapping[str, Any], view: str, tally: Tally) -> str | bytes:
        """Returns a view's caption, or the bytes of its embedding where the members hold those."""
        field = self.fields[view]
        if self.embeddings == "members":
            found = field.find(group)
            if isinstance(found, bytes):
                return found
        else:
            caption = field.text(group)
            if caption is not None:
                return caption
            long_caption = self.fields["long"].text(group)
            if view == "short" and long_caption and self.settings.short_caption_policy != "none":
                tally.note(f"short caption by {self.settings.short_caption_policy}")
                return POLICIES[self.settings.short_caption_policy](long_caption)
        raise Dropped(f"{view} caption is missing", f"looked for {field}; it has {_members(group)}")

    def _encode(self, shard: str, key: str, view: str, caption: str | bytes, tally: Tally) -> Tensor:
        if isinstance(caption, bytes):
            vector = decode_vector(caption)
            if self.adapter and len(vector) != self.adapter.width:
                raise Dropped(
                    f"{view} embedding is of another width",
                    f"{len(vector)} among the members, and {self.adapter.model} reads {self.adapter.width}; choose the "
                    "--model for that width",
                )
            return vector
        if isinstance(self.embeddings, StoreGroup):
            row = getattr(self.embeddings.lookup(shard, key, {view: caption}), view)
            return row.float()
        assert self.tokenizer is not None
        return _tokenize(self.tokenizer, caption, f"{view} caption", tally)

    def _teacher_tokens(self, view: str, contents: Mapping[str, Any], tally: Tally) -> list[Tensor]:
        if view not in self.teacher_parts:
            return []
        return [
            _tokenize(teacher.tokenize, contents[view], f"{view} caption for a teacher", tally)
            for teacher in self.teacher_tokenizers
        ]


def _tokenize(tokenizer: Tokenizer, caption: str, what: str, tally: Tally) -> Tensor:
    """Returns a caption's token ids [L]; that it was cut is noted, if the tokenizer counts what it cuts."""
    truncated = getattr(tokenizer, "truncated", 0)
    ids = tokenizer(caption)[0]
    if getattr(tokenizer, "truncated", 0) > truncated:
        tally.note(f"{what} truncated to {len(ids)} tokens")
    return ids


def _members(group: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name in group if not name.startswith("__"))) or "none of the members read"
