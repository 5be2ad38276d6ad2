from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jettclip.data.augmentation import Augmentation, draw, dump, parse
from jettclip.data.counts import Dropped
from jettclip.data.features import Store
from stores import KEYS, write, write_reinforced

SIZES = [(300, 400), (500, 375), (64, 64)]


def _drawn(count: int, skipped: bool = False) -> list[list[Augmentation]]:
    generator = Random(0)
    drawn = [[draw(size, generator) for _ in range(count)] for size in SIZES]
    return [[one._replace(operations=(None, one.operations[0])) for one in its] for its in drawn] if skipped else drawn


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("skipped", [False, True])
def test_each_augmentation_comes_back(count: int, skipped: bool, tmp_path: Path) -> None:
    augmentations = _drawn(count, skipped)
    # as others write them: with blanks
    texts = [json.dumps(json.loads(dump(its)), indent=index) for index, its in enumerate(augmentations)]
    write_reinforced(tmp_path / "s", texts, image_sizes=SIZES)
    store = Store(str(tmp_path / "s"))
    for row in range(len(KEYS)):
        drawn = store.drawn(row)
        assert drawn is not None
        assert parse(drawn.lines) == augmentations[row]
        for which in range(count):
            found = drawn.choose(which, count)
            assert found.augmentation == augmentations[row][which]
            assert found.drawn_for == SIZES[row]
            assert found.count == count
            found.check(SIZES[row])
            with pytest.raises(Dropped, match="another size"):
                found.check((SIZES[row][0] + 1, SIZES[row][1]))


def test_a_store_without_augmentations_has_none(tmp_path: Path) -> None:
    write(tmp_path / "s")
    assert Store(str(tmp_path / "s")).drawn(0) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b",\n", b", ", "1 lines for 3 augmentations"),
        (b"]]],\n", b"]]]]\n", "1 lines for 3 augmentations"),
        (b"[[[", b"[[{", "cannot be read"),
        (b"[[[", b"[[\xff", "cannot be read"),
        (b"100,200", b"301,200", "lies outside an image of"),
        (b"100,200", b"100,401", "lies outside an image of"),
        (b"100,200", b"-10,200", "cannot be read"),
    ],
)
def test_augmentations_that_are_damaged_are_dropped(old: bytes, new: bytes, said: str, tmp_path: Path) -> None:
    texts = [dump([Augmentation((0, 0, 100, 200), ((6, 0.25), (2, -0.1)))] * 3)] * len(KEYS)
    write_reinforced(tmp_path / "s", texts)
    with safe_open(tmp_path / "s", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "s")
    blob = bytes(tensors["paug"].tolist())
    assert old in blob
    tensors["paug"] = torch.frombuffer(bytearray(blob.replace(old, new)), dtype=torch.uint8)
    save_file(tensors, tmp_path / "s", metadata)
    drawn = Store(str(tmp_path / "s")).drawn(0)
    assert drawn is not None
    with pytest.raises(Dropped, match=said) as dropped:
        drawn.choose(0, 3)
    assert dropped.value.reason == "stored augmentation cannot be read"
