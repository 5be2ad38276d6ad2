"""Settings of samples: where captions stand, and what may be dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jettclip.settings.option import option

SHORT_CAPTION_WAYS = ("first-sentence", "drop-summary", "sample-sentences", "none")
"""How a short caption may be made of a long one."""


def caption_places(spec: str) -> list[list[tuple[str, float]]]:
    """Parses a caption field: alternatives separated by commas, each a pool of places with weights.

    Args:
        spec: such as ``txt*2+json:syn_text,json:caption``; weights are 1 unless given, and ``none`` names no place.

    Returns:
        for each alternative, its places with their weights; member extensions are in lower case.

    Raises:
        ValueError: if it names no place, or a weight is not positive.
    """
    if spec.strip() == "none":
        return []
    pools = [pool.split("+") for pool in spec.split(",") if pool.strip()]
    if not pools:
        raise ValueError(f"{spec!r} names no place; give a member name or json:KEY, or none if there are no captions")
    return [[_weighted_place(piece.strip(), spec) for piece in pool] for pool in pools]


def _weighted_place(piece: str, spec: str) -> tuple[str, float]:
    name, star, factor = piece.partition("*")
    place = name.strip() if name.startswith("json:") else name.strip().lower()
    if place in ("", "json:", "none"):
        raise ValueError(f"{piece!r} in {spec!r} names no place; give member names or json:KEY, such as txt+json:text")
    try:
        weight = float(factor) if star else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise ValueError(f"{piece!r} in {spec!r} has no positive weight; write it as in 'txt*2+json:text'")
    return place, weight


@dataclass(frozen=True)
class SampleSettings:
    """Samples: where their captions stand, and what may be dropped."""

    short_caption_field: str = option(
        "short_caption,json:short_caption",
        "Where the short caption stands: a tar member, or json:KEY in the json member; the first that exists. "
        "'json:a*2+json:b' chooses among several by weight, 'none' leaves them to --short-caption-policy.",
    )
    long_caption_field: str = option(
        "long_caption,json:long_caption,txt", "Where the long caption stands, likewise; OpenCLIP's txt comes last."
    )
    short_caption_policy: str = option(
        "first-sentence",
        "How to make a short caption of the long one for a sample that has none: first-sentence, drop-summary, "
        "sample-sentences, or 'none', which drops the sample. '+pad-shift' moves a random share of the padding in "
        "front of short captions.",
    )
    max_drop_rate: float = option(0.01, "Stop when more than this share of the samples had to be dropped.")
    max_image_pixels: int = option(50_000_000, "Drop images with more pixels than this.")
    image_decoder: str = option(
        "fast",
        "How images are decoded and resized: by libjpeg-turbo and torch's uint8 kernels, or by Pillow as in OpenCLIP.",
        choices=("fast", "pillow"),
    )
    allow_pipe_urls: bool = option(False, "Allow pipe: urls, which run shell commands.")

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings."""
        found = []
        if not 0 <= self.max_drop_rate <= 1:
            found.append(f"--max-drop-rate {self.max_drop_rate} must be a share between 0 and 1, such as 0.01")
        if self.max_image_pixels < 1:
            found.append(f"--max-image-pixels {self.max_image_pixels} must be positive, such as 50000000")
        for flag, places in (("short", self.short_caption_field), ("long", self.long_caption_field)):
            try:
                caption_places(places)
            except ValueError as error:
                found.append(f"--{flag}-caption-field {error}")
        if self.short_caption_way not in SHORT_CAPTION_WAYS:
            found.append(
                f"--short-caption-policy {self.short_caption_policy!r} is not one of {', '.join(SHORT_CAPTION_WAYS)}, "
                "perhaps with +pad-shift at its end, such as sample-sentences+pad-shift"
            )
        return found

    @property
    def short_caption_way(self) -> str:
        """How a short caption is made of the long one: `short_caption_policy` without ``pad-shift``."""
        policy = self.short_caption_policy
        return "first-sentence" if policy == "pad-shift" else policy.removesuffix("+pad-shift")

    @property
    def shifts_pads(self) -> bool:
        """Whether a random share of the padding of short captions moves in front of the text."""
        return self.short_caption_policy in ("pad-shift", self.short_caption_way + "+pad-shift")
