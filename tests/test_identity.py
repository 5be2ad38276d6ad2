from __future__ import annotations

import random

import pytest
import torch
import xxhash
from torch import Tensor

from jettclip.identity import identity_of, number_of, row_numbers
from jettclip.types import Batch, BatchInfo
from support import run_ranks

WORDS = 49406  # ids of CLIP's vocabulary that are words; 0 is one of them, and the padding


def spelt(*captions: list[int], length: int = 20) -> Tensor:
    return torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in captions])


def splitmix(value: int) -> int:
    """The published mixing function, in Python's integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def number_by_hand(ids: list[int]) -> int:
    places = ((place + 1) * 0x9E3779B97F4A7C15 for place in range(len(ids)))
    total = sum(splitmix((i + place) % 2**64) for i, place in zip(ids, places, strict=True) if i)
    number = splitmix(total % 2**64)
    return number - 2**64 if number >= 2**63 else number


def test_numbers_are_those_of_a_sum_over_places_that_wraps_around() -> None:
    rows = [[49406, 320, 1929, 49407], [49406, 320, 0, 1929, 49407], [-5, 2**31 - 1, -(2**31)], []]
    assert row_numbers(spelt(*rows)).tolist() == [number_by_hand(ids) for ids in rows]


def test_padding_to_any_length_leaves_the_number() -> None:
    generator = random.Random(0)
    rows = [[49406, *generator.choices(range(WORDS), k=generator.randint(0, 16)), 49407] for _ in range(500)]
    numbers = row_numbers(spelt(*rows, length=20))
    assert torch.equal(row_numbers(spelt(*rows, length=248)), numbers)
    for ids, number in zip(rows, numbers.tolist(), strict=True):
        assert row_numbers(torch.tensor([ids])).tolist() == [number]


def test_captions_that_are_nearly_alike_have_different_numbers() -> None:
    """Permutations, prefixes, neighbouring ids, ids moved by a place, and ids exchanged between places."""
    ids = [320, 321, 322, 5, 4, 3, 2, 1]
    captions = {tuple(ids[:n]) for n in range(1, 9)} | {(0,) * n + (i,) for n in range(30) for i in range(1, 30)}
    generator = random.Random(0)
    for _ in range(20000):
        captions.add(tuple(generator.sample(ids, 8)))
        captions.add(tuple(i + generator.randint(-1, 1) * (generator.random() < 0.3) for i in ids))
        captions.add(tuple(generator.choices((0, 1, 2), k=generator.randint(1, 14))))
    distinct = {(49406, *words, 49407) for words in captions}
    assert len(distinct) > 25000
    assert len(row_numbers(spelt(*map(list, distinct), length=40)).unique()) == len(distinct)


def test_the_number_of_a_caption_does_not_depend_on_its_row_or_memory() -> None:
    ids = torch.randint(0, WORDS, (64, 30))
    numbers = row_numbers(ids)
    assert torch.equal(row_numbers(ids.flip(0)), numbers.flip(0))
    assert torch.equal(row_numbers(ids.T.contiguous().T), numbers)
    assert torch.equal(row_numbers(ids.int()), numbers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_embeddings_are_compared_bit_by_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 16).to(dtype).repeat(2, 1)
    rows[0, 3] = torch.nextafter(rows[0, 3].float(), torch.tensor(9.0)) if dtype == torch.float32 else -rows[0, 3]
    numbers = row_numbers(rows)
    assert len(numbers.unique()) == 51
    assert torch.equal(numbers[1:50], numbers[51:])
    assert torch.equal(row_numbers(rows.float()), numbers)
    assert torch.equal(row_numbers(rows.T.contiguous().T), numbers)


def batch_of(short: Tensor | None, long: Tensor | None, rows: int = 3) -> Batch:
    return Batch(torch.zeros(rows, 3, 2, 2, dtype=torch.uint8), short, long, None)


def test_rows_with_one_image_or_caption_are_known_to_be_the_same() -> None:
    images = [number_of(data) for data in (b"\x00a", b"\xffb", b"\x00a")]
    long = spelt([1, 2], [1, 2], [2, 1])
    found = identity_of(batch_of(None, long), BatchInfo(["a", "b", "c"], {}, {}, {}, images))
    assert found.image.tolist() == images
    assert found.image.dtype == torch.int64
    assert images[0] == images[2] != images[1]
    assert found.short is None
    assert found.long is not None
    assert found.long.tolist() == row_numbers(long).tolist()
    assert found.long[0] == found.long[1] != found.long[2]


def test_an_image_has_the_number_that_stores_know_it_by() -> None:
    datas = [bytes([n]) * n for n in range(50)]
    unsigned = [xxhash.xxh3_64_intdigest(data) for data in datas]
    assert [number_of(data) % 2**64 for data in datas] == unsigned
    assert torch.tensor([number_of(data) for data in datas]).dtype == torch.int64
    assert max(unsigned) >= 2**63  # of which some are beyond int64


def test_without_image_numbers_the_keys_tell_samples_apart() -> None:
    info = BatchInfo(["a", "b", "a"], {}, {}, {})
    image = identity_of(batch_of(None, None), info).image
    assert image[0] == image[2] != image[1]


@pytest.mark.parametrize("info", [BatchInfo([], {}, {}, {}), BatchInfo(["a"] * 3, {}, {}, {}, [1, 2])])
def test_an_info_of_other_samples_is_refused(info: BatchInfo) -> None:
    with pytest.raises(ValueError, match=r"a batch of 3 rows comes with the names of \d samples; give one a row"):
        identity_of(batch_of(None, None), info)


def test_nothing_is_read_from_the_device() -> None:
    with torch.device("meta"):  # of which nothing can be read
        batch = batch_of(torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9))
    found = identity_of(batch, BatchInfo(["a", "b", "c"], {}, {}, {}, [1, 2, 3]))
    assert all(numbers is not None and numbers.is_meta and numbers.shape == (3,) for numbers in found)


def test_ranks_whose_batches_are_cropped_differently_agree() -> None:
    def work() -> list[int]:
        rank = torch.distributed.get_rank()
        long = spelt([9, 8, 7], [9, 8], length=4 + 10 * rank)
        found = identity_of(batch_of(None, long, 2), BatchInfo(["a", "b"], {}, {}, {}, [1, 2]))
        assert found.long is not None
        return found.long.tolist()

    first, second = run_ranks(2, work)
    assert first == second
