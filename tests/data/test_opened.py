from __future__ import annotations

import pytest

from jettclip.data.counts import Dropped
from jettclip.data.opened import Opened


def test_what_is_open_stays_open_up_to_so_many() -> None:
    asked: list[str] = []
    opened = Opened(lambda shard: asked.append(shard) or [shard], 2)
    for shard in ("a", "b", "a", "c", "b", "a"):
        assert opened.of(shard) == [shard]
    assert asked == ["a", "b", "c", "a"]  # a went for c, being the one opened first


def test_what_cannot_be_opened_is_tried_once_and_says_so_every_time() -> None:
    asked: list[str] = []

    def fail(shard: str) -> None:
        asked.append(shard)
        raise Dropped("missing", shard)

    opened = Opened(fail, 2)
    for _ in range(3):
        with pytest.raises(Dropped, match="missing: a"):
            opened.of("a")
    assert asked == ["a"]
