from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jettclip.data.policies import (
    POLICIES,
    drop_summary,
    first_sentence,
    is_random,
    pad_shift,
    sample_sentences,
    sentences,
)
from jettclip.settings import SHORT_CAPTION_WAYS

START, END = 49406, 49407

numbers = st.integers(0, 2**32)
plain_sentences = st.lists(
    st.from_regex(r"[a-f]{2,5}( [a-f]{2,5}){0,3}[.!?]", fullmatch=True), min_size=1, max_size=8, unique=True
)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog runs. It is brown!  Is it? Yes", ["A dog runs.", "It is brown!", "Is it?", "Yes"]),
        ("a dog runs. it is brown.", ["a dog runs.", "it is brown."]),
        ("A wall, e.g. 3.5 m high, i.e. tall. It is red.", ["A wall, e.g. 3.5 m high, i.e. tall.", "It is red."]),
        ("It is 2.5 m high. Mr. J. Doe, vs. Dr. Who.", ["It is 2.5 m high.", "Mr. J. Doe, vs. Dr. Who."]),
        ("What?! Well... fine.", ["What?!", "Well...", "fine."]),
        ('It says "Go!" in red. He said "Go." Then (it went.) Far.',
         ['It says "Go!" in red.', 'He said "Go."', "Then (it went.)", "Far."]),
        ("一只狗在跑。它是棕色的！真的吗？是", ["一只狗在跑。", "它是棕色的！", "真的吗？", "是"]),
        ("他说：“跑吧。”它跑了？！好", ["他说：“跑吧。”", "它跑了？！", "好"]),
        ("A title\n\nA dog\nruns. Far", ["A title", "A dog\nruns.", "Far"]),
        ("A dog", ["A dog"]),
        ("...", ["..."]),
    ],
)  # fmt: skip
def test_a_caption_is_split_into_sentences(caption: str, expected: list[str]) -> None:
    assert sentences(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog runs. It is brown.", "A dog runs"),
        ("A dog of 2.5 kg\nruns. It", "A dog of 2.5 kg runs"),
        ("A dog runs.", "A dog runs."),
        (". A dog runs. It", "A dog runs"),
        ("一只狗在跑。它是棕色的。", "一只狗在跑。"),
        ("A dog runs! It is brown.", "A dog runs!"),
    ],
)
def test_first_sentence_ends_at_a_full_stop_and_a_blank(caption: str, expected: str) -> None:
    assert first_sentence(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog runs. It is brown. Is it?", "It is brown. Is it?"),
        ("A dog runs.\n\nIt is brown.\nIt\tbarks", "It is brown. It\tbarks"),
        ("一只狗。它是棕色的！真的吗？", "它是棕色的！真的吗？"),
        ("A dog runs.", "A dog runs."),
    ],
)
def test_drop_summary_leaves_all_but_the_first_sentence(caption: str, expected: str) -> None:
    assert drop_summary(caption) == expected


def test_sample_sentences_draws_every_ordered_choice_by_its_size_first() -> None:
    """Of four sentences: 1, 2 or 3 of the last three with a chance of 1/3 each, then each ordered choice alike."""
    drawn = Counter(sample_sentences("A one. B two. C three. D four.", random.Random(seed)) for seed in range(6000))
    sizes = Counter[int]()
    for text, count in drawn.items():
        sizes[len(sentences(text))] += count
    assert {size: len([text for text in drawn if len(sentences(text)) == size]) for size in sizes} == {1: 3, 2: 6, 3: 6}
    assert all(1800 < count < 2200 for count in sizes.values())
    for text, count in drawn.items():
        expected = 2000 / {1: 3, 2: 6, 3: 6}[len(sentences(text))]
        assert 0.75 * expected < count < 1.25 * expected


def test_a_caption_of_one_sentence_is_not_sampled_away() -> None:
    assert sample_sentences("A dog runs.", random.Random(0)) == "A dog runs."


@given(st.text(min_size=1).filter(str.strip), numbers)
def test_no_policy_leaves_nothing(caption: str, seed: int) -> None:
    caption = caption.strip()
    for name, shorten in POLICIES.items():
        assert shorten(caption, random.Random(seed)).strip(), name


@given(st.text('ab.!? 。！"”\n', min_size=1).filter(str.strip))
def test_splitting_loses_nothing_but_blanks(caption: str) -> None:
    found = sentences(caption.strip())
    assert "".join("".join(found).split()) == "".join(caption.split())


@given(plain_sentences, numbers)
def test_policies_of_debias_clip_take_whole_sentences_but_the_first(parts: list[str], seed: int) -> None:
    caption, rest = " ".join(parts), parts[1:] or parts
    assert sentences(caption) == parts
    assert sentences(drop_summary(caption)) == rest
    sampled = sentences(sample_sentences(caption, random.Random(seed)))
    assert not Counter(sampled) - Counter(rest)
    assert sample_sentences(caption, random.Random(seed)) == sample_sentences(caption, random.Random(seed))


def test_only_sampling_is_random() -> None:
    assert [name for name in SHORT_CAPTION_WAYS if is_random(name)] == ["sample-sentences"]


def test_the_flag_takes_every_policy() -> None:
    assert {*POLICIES, "none"} == {*SHORT_CAPTION_WAYS}


@given(st.lists(st.integers(0, START - 1), max_size=20), st.integers(0, 10), numbers)
def test_pad_shift_moves_pads_in_front_of_the_text(text: list[int], pads: int, seed: int) -> None:
    ids = torch.tensor([START, *text, END, *[0] * pads])
    shifted = pad_shift(ids, random.Random(seed))
    moved = int(shifted.argmax()) - int(ids.argmax())
    assert 0 <= moved <= pads
    assert shifted.tolist() == [START, *[0] * moved, *text, END, *[0] * (pads - moved)]
    assert shifted.dtype == torch.int64


def test_pad_shift_draws_the_number_of_pads_uniformly() -> None:
    ids = torch.tensor([START, 5, 0, 6, END, 0, 0, 0])
    moved = Counter(int(pad_shift(ids, random.Random(seed)).argmax()) - 4 for seed in range(4000))
    assert sorted(moved) == [0, 1, 2, 3]
    assert all(900 < count < 1100 for count in moved.values())
