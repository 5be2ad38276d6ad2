"""Turns one tar group into one training sample; the only file that knows what a sample's members mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from jettclip.data.captions import POLICIES, CaptionField
from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import IMAGE_EXTENSIONS, decode_image, decode_vector
from jettclip.data.features import StoreGroup
from jettclip.seeding import seeded
from jettclip.settings import DataSettings
from jettclip.types import TeacherFeatures

Tokenizer = Callable[[str], Tensor]
"""A caption to token ids int64 [1, L], as every tokenizer of OpenCLIP does."""


class Sample(NamedTuple):
    """One image with its captions, ready to be collated."""

    key: str
    image: Tensor  # uint8 or float [3, H, W]
    short: Tensor | None  # token ids int64 [L], or an embedding float [D]
    long: Tensor | None  # the same
    teacher: TeacherFeatures | None  # rows [Dt]


class SampleReader:
    """Decodes tar groups into samples.

    Args:
        settings: where captions stand, and what to do without them.
        transform: PIL image to tensor, random or not.
        tokenizer: caption to token ids; unused where captions are stored embeddings.
        views: the caption views to read, ``short`` and ``long``; a sample without one of them is dropped.
        stores: teacher features to join, if any.
        teacher_parts: what to take of them, of ``image``, ``short``, ``long``.
        embeddings: stores whose ``short`` and ``long`` rows take the place of token ids, if any.
        seed: makes the random transform a function of seed, epoch and key, the same on any rank or worker.
    """

    def __init__(
        self,
        settings: DataSettings,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Tokenizer,
        views: tuple[str, ...],
        stores: StoreGroup | None = None,
        teacher_parts: tuple[str, ...] = (),
        embeddings: StoreGroup | None = None,
        seed: int = 0,
    ) -> None:
        self.settings, self.transform, self.tokenizer, self.views = settings, transform, tokenizer, views
        self.stores, self.teacher_parts, self.embeddings, self.seed = stores, teacher_parts, embeddings, seed
        self.fields = {
            "short": CaptionField(settings.short_caption_field),
            "long": CaptionField(settings.long_caption_field),
        }
        self.wanted = frozenset(IMAGE_EXTENSIONS).union(*(field.members for field in self.fields.values()))

    def read(self, group: Mapping[str, Any], epoch: int, tally: Tally) -> Sample:
        """Decodes one group of tar members.

        Raises:
            Dropped: with the reason, if the sample cannot be used.
        """
        return self.decode(group["__key__"], group["__shard__"], self.contents(group, tally), epoch)

    def contents(self, group: Mapping[str, Any], tally: Tally) -> dict[str, bytes | str]:
        """Finds the encoded ``image`` and the ``short`` and ``long`` captions among the members of a group.

        Raises:
            Dropped: with the reason, if one of them is missing, empty or unreadable.
        """
        image = next((group[extension] for extension in IMAGE_EXTENSIONS if extension in group), None)
        if image is None:
            raise Dropped("image is missing", f"it has {_members(group)}")
        return {"image": image, **{view: self._caption(group, view, tally) for view in self.views}}

    def decode(self, key: str, shard: str, contents: Mapping[str, Any], epoch: int) -> Sample:
        """Makes a sample of what `contents` found.

        Raises:
            Dropped: with the reason, if the image cannot be decoded or a stored feature is missing or stale.
        """
        # first, since a store has no row for a sample whose image cannot be decoded
        image = decode_image(contents["image"], self.settings.max_image_pixels)
        texts = {view: self._encode(shard, key, view, contents[view]) for view in self.views}
        teacher = None
        if self.stores is not None:
            teacher = self.stores.lookup(shard, key, {part: contents[part] for part in self.teacher_parts})
        with seeded(f"{self.seed} {epoch} {key}"):
            pixels = self.transform(image)
        return Sample(key, pixels, texts.get("short"), texts.get("long"), teacher)

    def _caption(self, group: Mapping[str, Any], view: str, tally: Tally) -> str | bytes:
        """Returns a view's caption, or the bytes of its embedding where the members hold those."""
        field = self.fields[view]
        if self.settings.text_embeddings == "members":
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

    def _encode(self, shard: str, key: str, view: str, caption: str | bytes) -> Tensor:
        if isinstance(caption, bytes):
            return decode_vector(caption)
        if self.embeddings is not None:
            row = getattr(self.embeddings.lookup(shard, key, {view: caption}), view)
            return row.float()
        return self.tokenizer(caption)[0]


def _members(group: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name in group if not name.startswith("__"))) or "none of the members read"
