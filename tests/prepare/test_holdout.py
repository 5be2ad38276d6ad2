from __future__ import annotations

import tracemalloc

import pytest
import xxhash

from jettclip.data.rows import Lost, Row
from jettclip.prepare.holdout import Item, smallest, split_rows


def row(number: int, image: str) -> Row:
    return Row(f"{number:09d}", image, {"long": ["A tree."]}, {}, "")


def split(items: list[Item], root: str, count: int, way: str) -> tuple[list[Item], list[Item]]:
    held, rest = split_rows(lambda: iter(items), root, count, way)
    return list(held), list(rest)


@pytest.mark.parametrize("count", [0, 3, 100, 1000])
def test_the_smallest_digests_are_those_of_a_full_sort(count: int) -> None:
    names = [f"picture {number % 400}.jpg" for number in range(900)]
    expected = sorted(set(names), key=lambda name: xxhash.xxh3_64_intdigest(name.encode()))[:count]
    assert smallest(names, count) == set(expected)


def test_the_first_rows_are_counted_with_those_that_are_lost() -> None:
    items: list[Item] = [row(0, "a"), Lost("no image in the row", "row 1"), row(2, "b"), row(3, "c")]
    assert split(items, "", 2, "first") == (items[:2], items[2:])


def test_all_rows_of_a_picture_fall_into_one_split_wherever_the_pictures_lie() -> None:
    names = [f"{number % 50}.jpg" for number in range(200)]
    chosen = []
    for root in ("/data/one", "two"):
        items: list[Item] = [row(number, f"{root}/{name}") for number, name in enumerate(names)]
        held, rest = split([*items, Lost("empty caption", "")], root, 5, "hash")
        assert len(held) == 20
        assert len(held) + len(rest) == 201
        held_names = {names[int(item.key)] for item in held if isinstance(item, Row)}
        assert not held_names & {names[int(item.key)] for item in rest if isinstance(item, Row)}
        chosen.append(held_names)
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 5


def test_memory_grows_with_the_held_out_only() -> None:
    tracemalloc.start()
    smallest((f"picture {number}.jpg" for number in range(50_000)), 10)
    assert tracemalloc.get_traced_memory()[1] < 20_000
    tracemalloc.stop()
