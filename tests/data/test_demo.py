from __future__ import annotations

import hashlib
import random
import tarfile
from pathlib import Path

import pytest

from jettclip import get_tokenizer
from jettclip.data import demo
from jettclip.data.decode import decode_image


def test_a_scene_is_a_function_of_seed_split_and_number() -> None:
    assert demo.make_sample("train", 7) == demo.make_sample("train", 7)
    others = [demo.make_sample("train", 8), demo.make_sample("val", 7), demo.make_sample("train", 7, seed=1)]
    assert all(other["jpg"] != demo.make_sample("train", 7)["jpg"] for other in others)


def test_the_captions_of_a_scene_are_known() -> None:
    """Pins what is drawn, so that a change of the demo's data is seen."""
    members = demo.make_sample("train", 3)
    assert members["short_caption"] == b"A bicycle and a monkey face on a light gray background."
    assert str(members["long_caption"], "utf-8").startswith(
        "A light gray background. There is a small bicycle in the first row and the first column. There is a medium "
    )


def test_scenes_are_as_the_readme_says() -> None:
    tokenize = get_tokenizer("Nano-248")
    kinds = set()
    lengths = []
    for number in range(200):
        scene = demo.invent_scene(random.Random(number))
        kinds |= {thing.emoji for thing in scene.things}
        assert 6 <= len(scene.things) <= 12
        assert len({(thing.row, thing.column) for thing in scene.things}) == len(scene.things)
        lengths.append(int(tokenize(demo.long_caption(scene)).argmax()) + 1)
        assert int(tokenize(demo.short_caption(scene)).argmax()) < 25
    assert len(kinds) == len(demo.EMOJIS) == 42
    assert 77 < min(lengths) < 100
    assert 170 < max(lengths) < 200


def test_every_emoji_is_drawn_and_named() -> None:
    names, pictures = set(), set()
    for emoji in demo.EMOJIS:
        scene = demo.Scene("white", [demo.Thing(emoji, "large", 1, 1)] * 2)
        names.add(demo.short_caption(scene))
        pictures.add(hashlib.sha256(demo.paint(scene, random.Random(0)).tobytes()).digest())
    assert len(names) == len(pictures) == len(demo.EMOJIS)
    colours = demo.paint(scene, random.Random(0)).getcolors(128 * 128)
    assert colours is not None
    assert len(colours) > 20  # in colour, not the outline of a missing glyph


def test_shards_are_ordinary_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHARD_SIZE", 3)
    shards = demo.write_demo_shards(tmp_path, "val", 5)
    assert [path.name for path in shards] == ["000000.tar", "000001.tar"]
    with tarfile.open(shards[1]) as tar:
        names = tar.getnames()
        stream = tar.extractfile("000003.jpg")
        assert stream is not None
        assert decode_image(stream.read(), 10**6).size == (128, 128)
    assert names == [f"{key}.{end}" for key in ("000003", "000004") for end in ("jpg", "long_caption", "short_caption")]
    before = [path.stat().st_mtime_ns for path in shards]
    demo.write_demo_shards(tmp_path, "val", 5)
    assert [path.stat().st_mtime_ns for path in shards] == before
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(ValueError, match="holds other scenes"):
        demo.write_demo_shards(tmp_path, "val", 6)
