"""Finds the captions of a sample, and makes a short one where there is only a long one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from jettclip.data.counts import Dropped
from jettclip.data.decode import decode_json, decode_text


class CaptionField:
    """Where a caption stands in a sample: the first of several places that exists.

    Args:
        places: comma-separated member extensions (``long_caption``, ``long.txt``) or keys of the JSON member
            (``json:long_caption``).
    """

    def __init__(self, places: str) -> None:
        stripped = [place.strip() for place in places.split(",") if place.strip()]
        self.places = [place if place.startswith("json:") else place.lower() for place in stripped]

    @cached_property
    def members(self) -> set[str]:
        """The extensions of the tar members that may hold the caption."""
        return {"json" if place.startswith("json:") else place for place in self.places}

    def find(self, sample: Mapping[str, Any]) -> bytes | str | None:
        """Returns the member's bytes, or the text in the JSON member; None if there is neither.

        Raises:
            Dropped: if the JSON member is no JSON object, or holds something else than text there.
        """
        for place in self.places:
            if not place.startswith("json:"):
                if place in sample:
                    return sample[place]
            elif "json" in sample:
                value = decode_json(sample["json"]).get(place.removeprefix("json:"))
                if isinstance(value, str):
                    return value
                if value is not None:
                    raise Dropped("caption in the json is not text", type(value).__name__)
        return None

    def text(self, sample: Mapping[str, Any]) -> str | None:
        """Returns the caption as text, or None if the sample has none.

        Raises:
            Dropped: if it is there, but is not UTF-8 or is empty.
        """
        value = self.find(sample)
        if value is None:
            return None
        return decode_text(value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass"))

    def __str__(self) -> str:
        return " or ".join(self.places)


def first_sentence(caption: str) -> str:
    """Returns the text before the first full stop that a blank follows (Long-CLIP, arXiv 2403.15378)."""
    return caption.replace("\n", " ").split(". ")[0]


POLICIES = {"first-sentence": first_sentence}
"""Ways to make a short caption of a long one, by the name that ``--short-caption-policy`` takes."""
