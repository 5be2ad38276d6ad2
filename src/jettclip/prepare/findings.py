"""What was found in shards and their feature stores; findings of many shards add up, and do not grow with the data."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Norms:
    """The lengths of feature vectors."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = 0.0

    def add(self, other: Norms) -> None:
        """Takes in other lengths."""
        self.count += other.count
        self.total += other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    def summary(self) -> dict[str, Any]:
        """Returns how many vectors there are, and their least, mean and largest length."""
        if not self.count:
            return {"rows": 0}
        return {"rows": self.count, "min": self.least, "mean": self.total / self.count, "max": self.most}


@dataclass
class StoreFindings:
    """What was found in the stores of one name."""

    problems: Counter[str] = field(default_factory=Counter)  # rows that are missing, stale or bad, and bad files
    teachers: Counter[str] = field(default_factory=Counter)  # stores by what they say of themselves
    unused: int = 0  # rows of samples that the shards do not have
    norms: dict[str, Norms] = field(default_factory=dict)  # by part

    def add(self, other: StoreFindings) -> None:
        """Takes in the findings of other stores."""
        self.problems.update(other.problems)
        self.teachers.update(other.teachers)
        self.unused += other.unused
        for part, norms in other.norms.items():
            self.norms.setdefault(part, Norms()).add(norms)

    def summary(self) -> dict[str, Any]:
        """Returns the findings as JSON values."""
        norms = {part: norms.summary() for part, norms in self.norms.items()}
        return {
            "teachers": dict(self.teachers),
            "problems": dict(self.problems),
            "unused_rows": self.unused,
            "norms": norms,
        }


@dataclass
class Findings:
    """What was found in shards.

    A sample with several faults is counted under each of them, and once in `bad`.
    """

    shards: int = 0
    samples: int = 0  # that are there, or should be
    bad: int = 0  # of these, that cannot be used
    problems: Counter[str] = field(default_factory=Counter)  # of samples, by reason
    damaged: Counter[str] = field(default_factory=Counter)  # irregularities of the files, by kind
    noted: Counter[str] = field(default_factory=Counter)  # nothing wrong, but worth knowing
    examples: dict[str, str] = field(default_factory=dict)  # the first case of each reason
    tokens: dict[str, Counter[int]] = field(default_factory=dict)  # captions by length, start and end included
    widths: Counter[int] = field(default_factory=Counter)  # images by pixels
    heights: Counter[int] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    pixels: int = 0
    image_bytes: int = 0
    stores: dict[str, StoreFindings] = field(default_factory=dict)

    def add(self, other: Findings) -> None:
        """Takes in the findings of other shards."""
        for name in ("shards", "samples", "bad", "pixels", "image_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("problems", "damaged", "noted", "widths", "heights", "shorter_sides"):
            getattr(self, name).update(getattr(other, name))
        self.examples = {**other.examples, **self.examples}
        for view, lengths in other.tokens.items():
            self.tokens.setdefault(view, Counter()).update(lengths)
        for name, store in other.stores.items():
            self.stores.setdefault(name, StoreFindings()).add(store)

    def problem(self, reason: str, example: str) -> None:
        """Counts a fault of a sample."""
        self.problems[reason] += 1
        self.examples.setdefault(reason, example)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.problems or self.damaged or any(store.problems for store in self.stores.values()))


def median(counts: Counter[int]) -> int:
    """Returns the median of counted values, the lower one of two; 0 of none."""
    half, passed = (counts.total() + 1) // 2, 0
    for value in sorted(counts):
        passed += counts[value]
        if passed >= half:
            return value
    return 0


def share_over(counts: Counter[int], limit: int) -> float:
    """Returns the share of counted values that are larger than `limit`."""
    return sum(count for value, count in counts.items() if value > limit) / max(1, counts.total())
