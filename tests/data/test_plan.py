from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jettclip.data.counts import DataError
from jettclip.data.plan import Division, divide, drawn_with_replacement, share, stretch
from jettclip.data.shards import Shard

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)
Sample = tuple[str, int]


def shards_of(sizes: Sequence[int]) -> list[Shard]:
    return [Shard(f"{index}.tar", size) for index, size in enumerate(sizes)]


def samples_of(shards: Sequence[Shard], start: int, stop: int, seed: int | None = 0) -> list[Sample]:
    return [
        (piece.shard.url, index)
        for piece in stretch(shards, start, stop, seed)
        for index in range(piece.first, piece.stop or 0)
    ]


def epoch_of(shards: Sequence[Shard], epoch: int, batch_size: int, world_size: int, workers: int) -> list[Sample]:
    """Returns what all workers of all ranks read in a training epoch, in the order of the stream."""
    samples = sum(shard.size for shard in shards)
    divisions = [Division(samples, batch_size, True, rank, world_size, workers) for rank in range(world_size)]
    return [
        sample
        for division in divisions
        for worker in range(workers)
        for sample in samples_of(shards, *division.piece(epoch, worker))
    ]


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_an_epoch_has_whole_steps_and_leaves_the_rest_to_the_next(
    samples: int, batch_size: int, world_size: int, workers: int, accumulated: int
) -> None:
    steps = samples // (batch_size * world_size * accumulated)
    pieces = []
    for epoch in range(3):
        for rank in range(world_size):
            division = Division(samples, batch_size, True, rank, world_size, workers, accumulated)
            assert division.batches == steps * accumulated
            assert sum(map(division.batches_of, range(workers))) == division.batches
            pieces += [division.piece(epoch, worker) for worker in range(workers)]
    assert [first for first, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
    assert (pieces[0][0], pieces[-1][1]) == (0, 3 * steps * accumulated * batch_size * world_size)


def test_too_few_samples_for_a_step_are_refused_with_what_helps() -> None:
    assert divide(24, None, 4, True, 0, 2, accumulated=3).batches == 3
    with pytest.raises(
        DataError, match=r"23 .* 2 ranks, which need 24 \(3 batches of 4 each\): .* or --accum-freq, or"
    ):
        divide(23, None, 4, True, 0, 2, accumulated=3)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_epochs_follow_one_another_in_one_stream(
    sizes: list[int], batch_size: int, world_size: int, workers: int
) -> None:
    shards = shards_of(sizes)
    whole = sum(sizes) // (batch_size * world_size) * batch_size * world_size
    read = [sample for epoch in range(5) for sample in epoch_of(shards, epoch, batch_size, world_size, workers)]
    assert read == samples_of(shards, 0, 5 * whole)
    once = set(samples_of(shards, 0, sum(sizes)))
    for first in range(0, len(read), sum(sizes)):
        one_pass = read[first : first + sum(sizes)]
        assert len(set(one_pass)) == len(one_pass)  # every sample at most once, and in a whole pass exactly once
        assert set(one_pass) <= once
    counts = Counter(read)
    assert max((counts[sample] for sample in once), default=0) - min(counts[sample] for sample in once) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 7))
def test_every_rank_has_the_same_number_of_full_batches(
    samples: int, batch_size: int, world_size: int, workers: int
) -> None:
    for rank in range(world_size):
        division = Division(samples, batch_size, True, rank, world_size, workers)
        assert division.batches == samples // (batch_size * world_size)
        assert sum(map(division.batches_of, range(workers))) == division.batches
        for worker in range(workers):
            start, stop = division.piece(3, worker)
            assert stop - start == batch_size * division.batches_of(worker)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 7))
def test_evaluation_reads_each_sample_once_in_order(
    sizes: list[int], batch_size: int, world_size: int, workers: int
) -> None:
    shards, read, lengths = shards_of(sizes), [], []
    for rank in range(world_size):
        division = Division(sum(sizes), batch_size, False, rank, world_size, workers)
        pieces = [samples_of(shards, *division.piece(0, worker), None) for worker in range(workers)]
        assert division.batches == sum(-(-len(piece) // batch_size) for piece in pieces)
        read += [sample for piece in pieces for sample in piece]
        lengths.append(sum(map(len, pieces)))
    assert read == [(f"{index}.tar", sample) for index, size in enumerate(sizes) for sample in range(size)]
    assert max(lengths) - min(lengths) <= 1


def test_passes_have_different_orders_that_the_seed_decides() -> None:
    shards = shards_of([1] * 20)
    orders = [samples_of(shards, 20 * number, 20 * number + 20, seed) for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == samples_of(shards, 0, 20, 0)
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (7, 7), (3, 23), (19, 40), (25, 26)])
def test_a_stretch_is_part_of_the_stream_wherever_it_begins(start: int, stop: int) -> None:
    shards = shards_of([4, 0, 5, 1])
    assert samples_of(shards, start, stop) == samples_of(shards, 0, 50)[start:stop]


def test_shards_are_drawn_by_weight() -> None:
    shards = [Shard("a", 0, 3.0), Shard("b", 0, 1.0)]
    drawn = [piece.shard.url for piece in islice(drawn_with_replacement(shards, "seed"), 4000)]
    assert Counter(drawn)["a"] == pytest.approx(3000, abs=150)
    assert drawn == [piece.shard.url for piece in islice(drawn_with_replacement(shards, "seed"), 4000)]
    assert drawn != [piece.shard.url for piece in islice(drawn_with_replacement(shards, "other"), 4000)]


@given(st.integers(0, 100), st.integers(1, 9))
def test_shares_are_adjacent_and_differ_by_one_at_most(count: int, parts: int) -> None:
    bounds = [share(count, parts, index) for index in range(parts)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == count
    assert all(before[1] == after[0] for before, after in zip(bounds[:-1], bounds[1:], strict=True))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("asked", "is_train", "samples"),
    [(None, True, 10), (20, True, 20), (4, True, 4), (None, False, 10), (20, False, 10), (3, False, 3)],
)
def test_an_epoch_has_the_samples_asked_for_but_evaluation_no_more_than_there_are(
    asked: int | None, is_train: bool, samples: int
) -> None:
    assert divide(10, asked, 2, is_train, world_size=2).samples == samples


@pytest.mark.parametrize(
    ("available", "is_train", "needed"), [(7, True, r"8 \(a batch of 4 each\)"), (1, False, r"2 \(one sample each\)")]
)
def test_too_few_samples_for_every_rank_are_refused(available: int, is_train: bool, needed: str) -> None:
    with pytest.raises(DataError, match=rf"{available} samples are too few for 2 ranks, which need {needed}"):
        divide(available, None, 4, is_train, world_size=2)
