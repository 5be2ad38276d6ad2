from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import torch

from jettclip.seeding import generator_of, random_state, seed_everything, seed_of, seeded, set_random_state

Draw = tuple[float, float, float, float]


def draw() -> Draw:
    # the normal ones leave half of a pair in the generators' states
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))


def test_a_seed_repeats_all_generators_and_ranks_differ() -> None:
    def drawn(seed: int, rank: int) -> Draw:
        seed_everything(seed, rank)
        return draw()

    assert drawn(3, 0) == drawn(3, 0)
    assert all(one != other for one, other in zip(drawn(3, 0), drawn(3, 1), strict=True))


def test_a_seed_of_64_bits_is_taken() -> None:
    seed_everything(2**40, rank=7)


def test_seeded_draws_the_same_and_leaves_no_trace() -> None:
    seed_everything(1)
    undisturbed = [draw(), draw(), draw()]
    seed_everything(1)
    first = draw()
    with seeded("sample 7"):
        inside = draw()
    second = draw()
    with seeded("sample 7"):
        again = draw()
    with seeded("sample 8"):
        other = draw()
    assert [first, second, draw()] == undisturbed
    assert inside == again
    assert all(one != two for one, two in zip(inside, other, strict=True))


def test_a_torch_generator_with_the_seed_of_a_text_draws_what_seeded_does() -> None:
    assert seed_of("sample 7") != seed_of("sample 8")
    own = torch.rand(5, generator=torch.Generator().manual_seed(seed_of("sample 7")))
    with seeded("sample 7"):
        assert torch.equal(torch.rand(5), own)


def test_a_generator_is_a_function_of_what_is_named() -> None:
    assert generator_of(1, 2, "key", "purpose").random() == generator_of(1, 2, "key", "purpose").random()
    assert len({generator_of(1, 2, key, what).random() for key in "ab\udcff" for what in ("x", "y")}) == 6


def test_seeded_restores_after_an_error() -> None:
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with contextlib.suppress(KeyError), seeded("x"):
        draw()
        raise KeyError
    assert draw() == expected


def test_a_saved_state_goes_on_where_it_was_and_needs_no_pickled_code() -> None:
    seed_everything(5)
    draw()
    stream = io.BytesIO()
    torch.save(random_state(), stream)
    expected = [draw() for _ in range(3)]
    seed_everything(6)
    stream.seek(0)
    set_random_state(torch.load(stream, weights_only=True))
    assert [draw() for _ in range(3)] == expected
