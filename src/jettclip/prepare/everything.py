"""Names all members of a sample at once."""

from __future__ import annotations


class Everything(frozenset[str]):
    """The extensions of all members, for `read_shard`."""

    def __contains__(self, extension: object) -> bool:
        return True


EVERYTHING = Everything()
