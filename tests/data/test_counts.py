from __future__ import annotations

import pickle
from collections import Counter

import pytest

from jettclip.data.counts import (
    ENOUGH_SAMPLES,
    FIRST_SAMPLES,
    DataError,
    Dropped,
    HeldDamage,
    Tally,
    check_drop_rate,
    describe,
)
from jettclip.types import BatchInfo


def test_a_run_without_a_first_usable_sample_stops_naming_the_reasons() -> None:
    tally = Tally()
    for number in range(FIRST_SAMPLES - 1):
        tally.drop("image is missing", f"sample {number}")
    with pytest.raises(DataError, match=r"image is missing 99, caption is empty 1; last: sample 99"):
        tally.drop("caption is empty", "sample 99")


def test_one_usable_sample_is_enough_to_go_on() -> None:
    tally = Tally()
    tally.keep()
    for number in range(2 * ENOUGH_SAMPLES):
        tally.drop("image is missing", f"sample {number}")
    assert tally.dropped == {"image is missing": 2 * ENOUGH_SAMPLES}


def test_samples_lost_before_the_first_was_decoded_do_not_stop_the_run() -> None:
    Tally().lose("shard holds fewer samples than it did when counted", "000000.tar", 5 * FIRST_SAMPLES)


def test_a_worker_stops_above_the_drop_rate_once_it_has_seen_enough() -> None:
    tally = Tally(max_drop_rate=0.01)
    tally.keep()
    for number in range(10):
        tally.drop("image is missing", f"sample {number}")
    for _ in range(ENOUGH_SAMPLES - 12):
        tally.keep()
    with pytest.raises(
        DataError, match=r"11 of 1000 samples were dropped \(image is missing 11\).*--max-drop-rate 0.01"
    ):
        tally.drop("image is missing", "sample 10")


@pytest.mark.parametrize(
    ("kept", "lost", "rate", "stops"), [(99, 1, 0.01, False), (98, 2, 0.01, True), (0, 5, 1.0, False)]
)
def test_the_drop_rate_may_be_reached_and_not_passed(kept: int, lost: int, rate: float, stops: bool) -> None:
    if stops:
        with pytest.raises(DataError):
            check_drop_rate(kept, Counter(reason=lost), rate)
    else:
        check_drop_rate(kept, Counter(reason=lost), rate)


def test_counts_travel_once() -> None:
    tally = Tally()
    tally.drop("image is missing", "sample 0")
    tally.note("short caption by first-sentence")
    first = BatchInfo(["a"], {"image is missing": 1}, {}, {"short caption by first-sentence": 1}, [-7])
    assert tally.since_last(["a"], [-7]) == first
    tally.damage("shard is cut short", "000000.tar")
    tally.drop("image is missing", "sample 1")
    assert tally.since_last(["b"]) == BatchInfo(["b"], {"image is missing": 1}, {"shard is cut short": 1}, {}, ())
    assert tally.since_last([]) == BatchInfo([], {}, {}, {}, ())


def test_a_reason_is_logged_once_with_an_example(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    for number in range(3):
        tally.drop("image is missing", f"sample {number}")
        tally.damage("shard is cut short", f"{number}.tar")
    assert caplog.messages == [
        "dropped sample 0: image is missing (further ones are only counted)",
        "0.tar: shard is cut short",
    ]


def test_damage_that_is_held_is_counted_and_logged_once_it_is_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    held = HeldDamage(tally)
    held.damage("shard is cut short", "0.tar")
    assert not tally.damaged
    held.settle(False)
    held.settle(True)
    assert not tally.damaged
    assert not caplog.messages
    held.damage("shard is cut short", "1.tar")
    held.settle(True)
    held.settle(True)
    assert tally.damaged == {"shard is cut short": 1}
    assert caplog.messages == ["1.tar: shard is cut short"]


@pytest.mark.parametrize("error", [DataError("what was found"), Dropped("image is missing", "it has txt")])
def test_errors_survive_the_way_from_a_worker(error: Exception) -> None:
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(type(error)("Caught in a worker")) == "Caught in a worker"  # as torch raises them again


def test_counts_are_described_most_frequent_first() -> None:
    assert describe({"a": 1, "b": 3}) == "b 3, a 1"
    assert describe({}) == "none"
