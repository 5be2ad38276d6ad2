"""All members of a sample, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Everything(frozenset[str]):
    """The extensions of all members, for `read_shard`."""

    def __contains__(self, extension: object) -> bool:
        return True


EVERYTHING = Everything()


def members_of(group: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the members of a sample by extension, without what else is known of it."""
    return {name: data for name, data in group.items() if not name.startswith("__")}
