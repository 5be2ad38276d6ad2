"""Small shards, and the ways in which `damage.py` damages them."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from jettclip.data.features import StoreInfo, digest, write_store

WIDTH = 16  # of the teacher features
BLOCK = tarfile.BLOCKSIZE
WORDS = ("red", "green", "blue", "apple", "dog", "cat", "house", "tree", "river", "car", "big", "small", "near", "over")

Members = list[tuple[str, bytes]]
Group = dict[str, str | bytes]


def make_groups(count: int, first: int) -> list[Group]:
    """Returns ordinary samples, with running numbers as keys."""
    groups = []
    for number in range(first, first + count):
        generator = np.random.default_rng(number)
        pixels = np.kron(generator.integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        image = io.BytesIO()
        Image.fromarray(pixels).save(image, "JPEG", quality=95)
        embedding = io.BytesIO()
        np.savez(embedding, embedding=generator.standard_normal(WIDTH).astype(np.float32))
        words = [str(word) for word in generator.choice(WORDS, 40)]
        groups.append(
            {
                "__key__": f"{number:06d}",
                "jpg": image.getvalue(),
                "txt": " ".join(words).encode(),
                "json": json.dumps({"short_caption": " ".join(words[:5]), "number": number}).encode(),
                "npz": embedding.getvalue(),  # for readers that find features in the shard
            }
        )
    return groups


def write_features(path: Path, groups: list[Group], width: int = WIDTH, bad_row: int | None = None) -> None:
    """Writes the store of a shard; one row may hold a NaN."""
    rows = [torch.Generator().manual_seed(int(group["__key__"])) for group in groups]
    features = {
        part: torch.stack([torch.randn(width, generator=generator) for generator in rows])
        for part in ("image", "short", "long")
    }
    if bad_row is not None:
        features["image"][bad_row, 3] = torch.nan
    contents = [(group["jpg"], json.loads(group["json"])["short_caption"], group["txt"]) for group in groups]
    digests = {
        part: [digest(content[place]) for content in contents] for place, part in enumerate(("image", "short", "long"))
    }
    info = StoreInfo("Teacher", "0", 100.0, False, "{}", width)
    write_store(path, [str(group["__key__"]) for group in groups], features, digests, info)


def tar_of(members: Members, links: tuple[str, ...] = ()) -> bytes:
    """Returns a tar of members, of which some are symbolic links."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            if name in links:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
                data = b""
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


@dataclass
class Shard:
    """A shard that is about to be damaged."""

    groups: list[Group]
    store: Path
    generator: random.Random
    tar: bytes = b""
    members: Members = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = [
            (f"{group['__key__']}.{name}", bytes(data))  # type: ignore[arg-type]
            for group in self.groups
            for name, data in group.items()
            if name != "__key__"
        ]
        self.tar = tar_of(self.members)
        self.victim = self.generator.randrange(len(self.groups))
        self.key = str(self.groups[self.victim]["__key__"])

    def rebuild(self, change: Callable[[str, bytes], list[tuple[str, bytes]]], links: tuple[str, ...] = ()) -> None:
        """Writes the tar anew, of what `change` makes of each member."""
        self.tar = tar_of([made for name, data in self.members for made in change(name, data)], links)

    def replace(self, extension: str, *data: bytes) -> None:
        """Gives one sample another member of an extension, or none."""
        name = f"{self.key}.{extension}"
        self.rebuild(lambda other, its: [(name, new) for new in data] if other == name else [(other, its)])

    def data_of(self, extension: str) -> bytes:
        """Returns a member of the sample that is damaged."""
        return bytes(self.groups[self.victim][extension])  # type: ignore[arg-type]

    def header(self) -> int:
        """Returns where the header of a random member stands."""
        with tarfile.open(fileobj=io.BytesIO(self.tar)) as tar:
            return self.generator.choice([member.offset for member in tar])


def truncated_tar(shard: Shard) -> None:
    """Cuts the tar anywhere."""
    shard.tar = shard.tar[: shard.generator.randrange(1, len(shard.tar))]


def bit_flips(shard: Shard) -> None:
    """Flips 1 to 64 bits."""
    data = bytearray(shard.tar)
    for _ in range(shard.generator.randint(1, 64)):
        data[shard.generator.randrange(len(data))] ^= 1 << shard.generator.randrange(8)
    shard.tar = bytes(data)


def zeroed_blocks(shard: Shard) -> None:
    """Zeroes 1 to 16 blocks of 512 bytes."""
    data = bytearray(shard.tar)
    for _ in range(shard.generator.randint(1, 16)):
        start = shard.generator.randrange(len(data) // BLOCK) * BLOCK
        data[start : start + BLOCK] = bytes(BLOCK)
    shard.tar = bytes(data)


def garbage_over_a_header(shard: Shard) -> None:
    """Writes random bytes over a header."""
    start = shard.header()
    shard.tar = shard.tar[:start] + shard.generator.randbytes(BLOCK) + shard.tar[start + BLOCK :]


def wrong_size_in_a_header(shard: Shard) -> None:
    """States another size in a header, with the checksum that belongs to it."""
    start = shard.header()
    header = bytearray(shard.tar[start : start + BLOCK])
    header[124:136] = b"%011o\0" % shard.generator.choice([0, 1, 700, 5000, 10**6, 2**32 - 1])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard.tar = shard.tar[:start] + bytes(header) + shard.tar[start + BLOCK :]


def empty_file(shard: Shard) -> None:
    """Leaves an empty file."""
    shard.tar = b""


def html_page(shard: Shard) -> None:
    """Leaves what a web server says when it has no such file."""
    shard.tar = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n" * 20


def missing_text(shard: Shard) -> None:
    """Takes a caption away."""
    shard.replace("txt")


def missing_image(shard: Shard) -> None:
    """Takes an image away."""
    shard.replace("jpg")


def missing_feature_row(shard: Shard) -> None:
    """Takes the features of a sample away."""
    shard.replace("npz")
    write_features(shard.store, [group for group in shard.groups if group["__key__"] != shard.key])


def empty_image(shard: Shard) -> None:
    """Empties an image."""
    shard.replace("jpg", b"")


def truncated_image(shard: Shard) -> None:
    """Cuts an image anywhere."""
    data = shard.data_of("jpg")
    shard.replace("jpg", data[: shard.generator.randrange(1, len(data))])


def random_image(shard: Shard) -> None:
    """Puts random bytes in the place of an image."""
    shard.replace("jpg", shard.generator.randbytes(700))


def image_that_is_text(shard: Shard) -> None:
    """Puts an SVG in the place of a JPEG."""
    shard.replace("jpg", b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"/>')


def text_that_is_not_utf8(shard: Shard) -> None:
    """Puts Latin-1 and worse into a caption."""
    shard.replace("txt", b"a caf\xe9 in \xff\xfe Paris")


def empty_text(shard: Shard) -> None:
    """Empties a caption."""
    shard.replace("txt", b"")


def cut_json(shard: Shard) -> None:
    """Cuts the JSON member anywhere."""
    data = shard.data_of("json")
    shard.replace("json", data[: shard.generator.randrange(len(data))])


def features_of_another_width(shard: Shard) -> None:
    """Puts features of half the width in the place of the shard's."""
    shard.replace("npz", _npz(np.zeros(WIDTH // 2, np.float32)))
    write_features(shard.store, shard.groups, width=WIDTH // 2)


def feature_with_nan(shard: Shard) -> None:
    """Puts a NaN into a feature."""
    shard.replace("npz", _npz(np.full(WIDTH, np.nan, np.float32)))
    write_features(shard.store, shard.groups, bad_row=shard.victim)


def cut_store(shard: Shard) -> None:
    """Cuts the store anywhere."""
    npz, store = shard.data_of("npz"), shard.store.read_bytes()
    shard.replace("npz", npz[: shard.generator.randrange(1, len(npz))])
    shard.store.write_bytes(store[: shard.generator.randrange(len(store))])


def bit_flips_in_the_features(shard: Shard) -> None:
    """Flips 1 to 64 bits anywhere in the store."""
    npz, store = bytearray(shard.data_of("npz")), bytearray(shard.store.read_bytes())
    npz[-100 - shard.generator.randrange(WIDTH)] ^= 1 << shard.generator.randrange(8)
    shard.replace("npz", bytes(npz))
    for _ in range(shard.generator.randint(1, 64)):
        store[shard.generator.randrange(len(store))] ^= 1 << shard.generator.randrange(8)
    shard.store.write_bytes(store)


def store_with_another_tensor_name(shard: Shard) -> None:
    """Calls the image features something else."""
    shard.replace("npz", _npz(np.zeros(WIDTH, np.float32), name="other"))
    with safe_open(shard.store, "pt") as store:
        tensors = {name.replace("image", "picture"): store.get_tensor(name) for name in store.keys()}  # noqa: SIM118
        metadata = store.metadata()
    save_file(tensors, shard.store, metadata)


def duplicate_key(shard: Shard) -> None:
    """Repeats a sample at the end of the shard."""
    copy = [(name, data) for name, data in shard.members if name.startswith(shard.key)]
    shard.members += copy
    shard.rebuild(lambda name, data: [(name, data)])


def members_not_grouped_by_key(shard: Shard) -> None:
    """Sorts the members by extension, as some archivers do."""
    shard.members.sort(key=lambda member: member[0].split(".")[1])
    shard.rebuild(lambda name, data: [(name, data)])


def key_that_climbs(shard: Shard) -> None:
    """Puts an image two folders up."""
    name = f"{shard.key}.jpg"
    shard.rebuild(lambda other, data: [(f"../../{other}" if other == name else other, data)])


def symbolic_link(shard: Shard) -> None:
    """Puts a symbolic link in the place of an image."""
    shard.rebuild(lambda name, data: [(name, data)], links=(f"{shard.key}.jpg",))


def decompression_bomb(shard: Shard) -> None:
    """Puts a PNG of 20,000 x 20,000 pixels, 49 kB, in the place of an image."""
    shard.replace("jpg", _bomb())


@cache
def _bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(20_000 * (1 + 20_000 // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _npz(embedding: np.ndarray, name: str = "embedding") -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: embedding})
    return stream.getvalue()


KINDS: tuple[Callable[[Shard], None], ...] = (
    truncated_tar, bit_flips, zeroed_blocks, garbage_over_a_header, wrong_size_in_a_header, empty_file, html_page,
    missing_text, missing_image, missing_feature_row, empty_image, truncated_image, random_image, image_that_is_text,
    text_that_is_not_utf8, empty_text, cut_json, features_of_another_width, feature_with_nan, cut_store,
    bit_flips_in_the_features, store_with_another_tensor_name, duplicate_key, members_not_grouped_by_key,
    key_that_climbs, symbolic_link, decompression_bomb,
)  # fmt: skip
