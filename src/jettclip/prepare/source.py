"""Opens the data set that shards are made of, whatever its kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jettclip.data.conversations import read_conversations
from jettclip.data.counts import Tally
from jettclip.data.folders import read_folder
from jettclip.data.tables import read_table
from jettclip.prepare.holdout import Item
from jettclip.prepare.references import read_references
from jettclip.prepare.settings import BuildSettings


class Source(NamedTuple):
    """A data set that can be read several times."""

    rows: Callable[[Tally], Iterator[Item]]  # starts a pass, which counts damage to shards in the tally
    root: str  # folder of the pictures


def open_source(settings: BuildSettings) -> Source:
    """Returns the source that the settings name; nothing is read yet."""
    s = settings
    root = s.image_root if s.image_root is not None else os.path.dirname(s.input)
    if s.kind == "folder":
        return Source(lambda _: read_folder(s.input, s.caption_pattern, s.output), s.input)
    if s.kind == "conversations":
        return Source(lambda _: read_conversations(s.input, root), root)
    if s.kind == "shards":
        return Source(lambda tally: read_references(s, tally), "")
    captions = {"long": s.long_caption_column, "short": s.short_caption_column}
    return Source(lambda _: read_table(s.input, root, s.image_column, captions, s.separator), root)
