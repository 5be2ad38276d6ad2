"""What may be asked of the building of shards."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from PIL import ImageColor

from jettclip.data import conversations, tables

INPUT_TYPES = ("conversations", "table", "folder", "shards")
IMAGE_FORMATS = ("jpg", "png", "webp")
HOLDOUT_WAYS = ("first", "hash")

_SUFFIXES = {
    **dict.fromkeys(conversations.SUFFIXES, "conversations"),
    **dict.fromkeys(tables.SUFFIXES, "table"),
    **dict.fromkeys((".tar", ".tgz", ".tar.gz"), "shards"),
}


@dataclass(frozen=True)
class BuildSettings:
    """A data set to read and how to write it; the flags of ``scripts/build_shards.py`` say what each means."""

    input: str
    output: str
    input_type: str = ""
    image_root: str | None = None
    image_column: str | None = None
    long_caption_column: tuple[str, ...] = ()
    short_caption_column: tuple[str, ...] = ()
    separator: str | None = None
    caption_pattern: str | None = None
    join: str | None = None
    join_key: str | None = None
    keep_keys: str | None = None
    drop_keys: str | None = None
    holdout: int = 0
    holdout_way: str = "first"
    shard_size: int = 1000
    max_side: int = 0
    min_side: int = 0
    reencode: bool = False
    image_format: str = "jpg"
    quality: int = 95
    background: str = "white"
    max_image_pixels: int = 50_000_000
    workers: int = 0

    @property
    def kind(self) -> str:
        """One of `INPUT_TYPES`: what was asked for, or what the input's name tells; empty if it tells nothing."""
        if self.input_type or os.path.isdir(self.input):
            return self.input_type or "folder"
        return next((kind for suffix, kind in _SUFFIXES.items() if self.input.lower().endswith(suffix)), "")

    @property
    def of_samples(self) -> tuple[Any, ...]:
        """Whatever else than the rows decides what a shard holds."""
        pictures = self.max_side, self.min_side, self.reencode, self.image_format, self.quality, self.background
        return (*pictures, self.max_image_pixels)

    def problems(self) -> list[str]:
        """Returns the mistakes in these settings."""
        reads_shards = self.kind == "shards"
        for_shards = [self.join, self.join_key, self.keep_keys, self.drop_keys]
        for_tables = [self.image_column, self.long_caption_column, self.short_caption_column, self.separator]
        checks = [
            (not self.kind, f"--input {self.input!r} does not tell what it is; add --input-type"),
            (self.holdout < 0, f"--holdout {self.holdout} must be a number of rows, such as 1000"),
            (self.shard_size < 1, f"--shard-size {self.shard_size} must be positive, such as 1000"),
            (self.max_side < 0, f"--max-side {self.max_side} must be a number of pixels, such as 512"),
            (self.min_side < 0, f"--min-side {self.min_side} must be a number of pixels, such as 32"),
            (not 1 <= self.quality <= 100, f"--quality {self.quality} must be from 1 to 100"),
            (
                not _is_colour(self.background),
                f"--background {self.background!r} is no colour, such as white",
            ),
            (self.max_image_pixels < 1, f"--max-image-pixels {self.max_image_pixels} must be positive"),
            (self.workers < 0, f"--workers {self.workers} must be positive, or 0 for one a core"),
            (
                any(for_shards) and not reads_shards,
                "--join, --join-key, --keep-keys and --drop-keys are for shards; leave them out",
            ),
            (
                any(for_tables) and self.kind != "table",
                "--separator and the columns are for tables; leave them out",
            ),
            (bool(self.caption_pattern) and self.kind != "folder", "--caption-pattern is for folders; leave it out"),
            (
                self.join_key is not None and not re.fullmatch(r"json:.+", self.join_key),
                f"--join-key {self.join_key!r} must name a value of the json member, such as json:uid",
            ),
        ]
        return [message for wrong, message in checks if wrong]


def _is_colour(text: str) -> bool:
    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False
