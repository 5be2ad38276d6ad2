"""Finds the captions of a sample, chooses among several, and makes a short one where there is only a long one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from jettclip.data.counts import Dropped, Tally
from jettclip.data.decode import decode_json, decode_text
from jettclip.data.policies import POLICIES, is_random
from jettclip.seeding import generator_of
from jettclip.settings import SampleSettings, caption_places


class Caption(NamedTuple):
    """A caption, and where in the sample it stands."""

    text: str | bytes  # bytes: of a member as it stands, such as an embedding in raw float32
    place: str  # "short_caption", "json:long_caption", "syn.json:syn_text"
    index: int = 0  # type: ignore[assignment]  # among the captions of that place
    weight: float = 1.0  # relative chance of the place, which its captions share
    policy: str = ""  # what made it of the caption in this place; empty for one that stands there as it is


class Field(Protocol):
    """Where the captions of a view stand."""

    @property
    def members(self) -> set[str]:
        """The extensions of the tar members that may hold them."""

    def find(self, group: Mapping[str, Any]) -> list[Caption]:
        """Returns the captions of a sample, as they stand there: text, or a member's bytes."""


class CaptionField:
    """Where the captions of a view stand in a sample: at the first of several places, or pools of places, that exists.

    Args:
        spec: comma-separated alternatives, each a member extension (``long_caption``, ``long.txt``) or a key of the
            JSON member (``json:long_caption``), or several of them that are pooled, with weights (``txt*2+json:text``).
            A member is one caption, whatever its lines; a list in the JSON is as many as it has texts.
    """

    def __init__(self, spec: str) -> None:
        self.pools = caption_places(spec)

    @cached_property
    def members(self) -> set[str]:
        """The extensions of the tar members that may hold a caption."""
        return {"json" if place.startswith("json:") else place for pool in self.pools for place, _ in pool}

    def find(self, group: Mapping[str, Any]) -> list[Caption]:
        """Returns the captions of the first alternative that exists, as they stand there; none if there is none.

        Raises:
            Dropped: if the JSON member is no JSON object, or holds something else than text there.
        """
        for pool in self.pools:
            found = [caption for place, weight in pool for caption in _captions_at(place, weight, group)]
            if found:
                return found
        return []

    def __str__(self) -> str:
        return " or ".join(" + ".join(place for place, _ in pool) for pool in self.pools) or "none"


def _captions_at(place: str, weight: float, group: Mapping[str, Any]) -> list[Caption]:
    if not place.startswith("json:"):
        return [Caption(group[place], place, 0, weight)] if place in group else []
    value = decode_json(group["json"]).get(place.removeprefix("json:")) if "json" in group else None
    texts = [] if value is None else value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise Dropped("caption in the json is not text", f"{place} holds {type(text).__name__}")
    return [Caption(text, place, index, weight) for index, text in enumerate(texts)]


class CaptionReader:
    """Reads one caption a view from every sample.

    What is chosen or made at random is a function of seed, epoch, key and view.

    Args:
        settings: where captions stand, and how to make a short one of the long one.
        views: those to read, of ``short`` and ``long``.
        seed: of the choice.
        embedded: whether members hold embeddings in raw float32, of which no short one can be made.
        fields: where the captions of a view stand, in place of what `settings` say.
    """

    def __init__(
        self,
        settings: SampleSettings,
        views: Sequence[str],
        *,
        seed: int = 0,
        embedded: bool = False,
        fields: Mapping[str, Field] | None = None,
    ) -> None:
        self.views, self.seed, self.embedded = tuple(views), seed, embedded
        self.policy = settings.short_caption_way
        self.fields: dict[str, Field] = {
            "short": CaptionField(settings.short_caption_field),
            "long": CaptionField(settings.long_caption_field),
            **(fields or {}),
        }

    @cached_property
    def members(self) -> set[str]:
        """The extensions of the tar members to read."""
        return set().union(*(field.members for field in self.fields.values()))

    @property
    def random_views(self) -> tuple[str, ...]:
        """Views whose captions may be drawn anew in every epoch, so that `every` cannot tell them beforehand."""
        return ("short",) if is_random(self.policy) and "short" in self.views and not self.embedded else ()

    def read(self, group: Mapping[str, Any], epoch: int, tally: Tally) -> dict[str, Caption]:
        """Returns one caption for each view: chosen, or made of the long one that is chosen.

        Raises:
            Dropped: if a view has none, or none that can be used.
        """
        chosen = {}
        for view, (origin, captions) in self._captions(group, tally).items():
            caption = captions[0]
            if len(captions) > 1:  # a generator costs more than all else here
                sharing = Counter(each.place for each in captions)
                weights = [each.weight / sharing[each.place] for each in captions]
                caption = generator_of(self.seed, epoch, group["__key__"], origin).choices(captions, weights)[0]
            if origin != view:
                drawn = generator_of(self.seed, epoch, group["__key__"], "policy") if is_random(self.policy) else None
                caption = self._shorten(caption, drawn)
            chosen[view] = caption
        return chosen

    def every(self, group: Mapping[str, Any], tally: Tally) -> dict[str, list[Caption]]:
        """Returns all captions of each view that `read` may return in any epoch, in order, for extraction.

        Raises:
            Dropped: if a view has none, or none that can be used, or would have one drawn anew in every epoch.
        """
        if self.random_views and not self.fields["short"].find(group):
            raise Dropped("short caption is missing", f"{self.policy} makes another one in every epoch")
        return {
            view: captions if origin == view else [self._shorten(caption, None) for caption in captions]
            for view, (origin, captions) in self._captions(group, tally).items()
        }

    def _captions(self, group: Mapping[str, Any], tally: Tally) -> dict[str, tuple[str, list[Caption]]]:
        """Returns for each view the captions it has, or those to make its own of, with the view whose they are."""
        usable: dict[str, list[Caption]] = {}

        def captions_of(view: str) -> list[Caption]:
            if view not in usable:
                usable[view] = self._usable(self.fields[view].find(group), tally)
            return usable[view]

        found = {}
        for view in self.views:
            if captions_of(view):
                found[view] = (view, captions_of(view))
            elif view == "short" and self.policy in POLICIES and not self.embedded and captions_of("long"):
                tally.note(f"short caption by {self.policy}")
                found[view] = ("long", captions_of("long"))
            else:
                raise Dropped(f"{view} caption is missing", f"looked for {self.fields[view]}; it has {_members(group)}")
        return found

    def _usable(self, captions: list[Caption], tally: Tally) -> list[Caption]:
        """Decodes captions; of several, those that cannot be used are left out."""
        if len(captions) == 1:
            return [self._decoded(captions[0])]
        usable, problem = [], None
        for caption in captions:
            try:
                usable.append(self._decoded(caption))
            except Dropped as dropped:
                tally.note(f"{dropped.reason}, one of several")
                problem = dropped
        if problem and not usable:
            raise problem
        return usable

    def _decoded(self, caption: Caption) -> Caption:
        text = caption.text
        if isinstance(text, bytes):
            return caption if self.embedded else caption._replace(text=decode_text(text))
        return caption._replace(text=decode_text(text.encode("utf-8", "surrogatepass")))

    def _shorten(self, caption: Caption, generator: random.Random | None) -> Caption:
        assert isinstance(caption.text, str)
        text = POLICIES[self.policy](caption.text, generator)
        return caption._replace(text=text, policy=self.policy)


def _members(group: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name in group if not name.startswith("__"))) or "none of the members read"
