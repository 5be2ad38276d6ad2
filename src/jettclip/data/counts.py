"""Counts what is lost on the way from a shard to a batch, by reason; nothing is dropped without passing here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from jettclip.types import BatchInfo

FIRST_SAMPLES = 100
"""So many bad samples in a row, before the first good one, mean that the data is not what the flags say."""

ENOUGH_SAMPLES = 1000
"""From so many samples on, the drop rate is held against ``--max-drop-rate`` while the epoch runs."""


class DataError(ValueError):
    """The data cannot be used as configured; the message says what was found and what to change."""


class Dropped(Exception):
    """Raised while a sample is decoded: it is left out and counted under `reason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Tally:
    """The running counts of one worker and one epoch.

    Args:
        max_drop_rate: share of samples that may be dropped before the run is stopped.
    """

    def __init__(self, max_drop_rate: float = 1.0) -> None:
        self.max_drop_rate = max_drop_rate
        self.kept = 0
        self.unusable = 0
        self.dropped: Counter[str] = Counter()
        self.damaged: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self._reported: tuple[Counter[str], Counter[str], Counter[str]] = (Counter(), Counter(), Counter())

    def keep(self) -> None:
        """Counts a sample that reached a batch."""
        self.kept += 1

    def note(self, event: str) -> None:
        """Counts something worth reporting that loses nothing, such as a caption made by a policy."""
        self.noted[event] += 1

    def damage(self, event: str, shard: str) -> None:
        """Counts damage to a shard, and warns the first time it is seen; how many samples it cost may be unknown."""
        if not self.damaged[event]:
            logging.warning(f"{shard}: {event}")
        self.damaged[event] += 1

    def drop(self, reason: str, example: str) -> None:
        """Counts a sample that was read and cannot be used.

        Raises:
            DataError: if the first `FIRST_SAMPLES` samples were all dropped, or more than `max_drop_rate` of them.
        """
        self.unusable += 1
        self.lose(reason, example)
        if self.kept == 0 and self.unusable >= FIRST_SAMPLES:
            raise DataError(
                f"none of the first {self.unusable} samples is usable: {describe(self.dropped)}; last: {example}"
            )

    def lose(self, reason: str, example: str, count: int = 1) -> None:
        """Counts samples that are not there to be read; those before them may still be waiting to be used.

        Raises:
            DataError: if more than `max_drop_rate` of the samples were dropped.
        """
        if not self.dropped[reason]:
            logging.warning(f"dropped {example}: {reason} (further ones are only counted)")
        self.dropped[reason] += count
        if self.kept + self.dropped.total() >= ENOUGH_SAMPLES:
            check_drop_rate(self.kept, self.dropped, self.max_drop_rate)

    def since_last(self, keys: list[str], images: Sequence[int] = ()) -> BatchInfo:
        """Returns what was counted since the last call, to travel beside the batch of the samples `keys`.

        Args:
            keys: of the samples.
            images: their images' numbers, as `BatchInfo` has them.
        """
        now = (self.dropped.copy(), self.damaged.copy(), self.noted.copy())
        dropped, damaged, noted = (dict(new - old) for new, old in zip(now, self._reported, strict=True))
        self._reported = now
        return BatchInfo(keys, dropped, damaged, noted, images)


class HeldDamage:
    """Damage to a shard, until it is known which of its readers is to count it.

    All who read a slice of a shard walk it from its start, and find the same damage on their way.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._found: list[tuple[str, str]] = []

    def damage(self, event: str, shard: str) -> None:
        """Holds back what `Tally.damage` would count and log."""
        self._found.append((event, shard))

    def settle(self, mine: bool) -> None:
        """Counts what is held back if it is this reader's to count, and forgets it if it is another's."""
        if mine:
            for event, shard in self._found:
                self._tally.damage(event, shard)
        self._found.clear()


def check_drop_rate(kept: int, dropped: Counter[str], max_drop_rate: float) -> None:
    """Raises DataError if more than `max_drop_rate` of the samples were dropped."""
    lost = dropped.total()
    if lost > max_drop_rate * (kept + lost):
        raise DataError(
            f"{lost} of {kept + lost} samples were dropped ({describe(dropped)}), more than --max-drop-rate "
            f"{max_drop_rate:g} allows; repair the data, or raise the flag to go on without them"
        )


def describe(counts: Counter[str] | dict[str, int]) -> str:
    """Puts counts into words: ``missing image 3, empty caption 1``; ``none`` for no counts."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda c: -c[1])) or "none"
